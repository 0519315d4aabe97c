"""Names of models."""

import pytest

from model.errors import ModelError
from model.find import find_model


def test_an_unknown_model_says_where_was_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="no model 'nobody'"):
        find_model("nobody")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_model("mine") == tmp_path / "models" / "mine"
    with pytest.raises(ModelError):
        find_model("../mine/../../etc")
