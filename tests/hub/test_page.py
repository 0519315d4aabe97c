"""A visitor loads a storyteller of the Hub on the story page, over real HTTP from the stand-in Hub."""

from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from huggingface_hub import constants
from streamlit.testing.v1 import AppTest

from model.config import CHECKOUT


@pytest.fixture
def app(hub: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page of a visitor; `tiny_model` is the storyteller it begins with."""
    monkeypatch.setenv("TALELOOM_MODEL", str(tiny_model))
    monkeypatch.setenv("TALELOOM_DEVICE", "cpu")
    yield AppTest.from_file(str(CHECKOUT / "app.py"), default_timeout=60).run()
    st.cache_resource.clear()


def load(app: Any, spec: str) -> None:
    app.text_input(key="model_field").set_value(spec)
    next(button for button in app.button if button.label == "Load").click().run()
    assert not app.exception


def test_a_storyteller_of_the_hub_is_loaded_without_the_server_s_token(
    app: Any, hub: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_of_the_server")
    hub.push("someone/tiny", tiny_model)
    load(app, "someone/tiny")
    assert app.session_state["model"] == "someone/tiny"
    assert any(path.endswith("model.safetensors") for _, path, _ in hub.requests)
    assert hub.authorizations == {None}, "a stranger must not read what the server's owner may"


def test_what_the_hub_does_not_have_is_said_and_the_storyteller_stays(app: Any) -> None:
    load(app, "someone/nothing")
    assert "has no model" in app.error[0].value.replace("\\", "") and app.session_state["model"] is None
