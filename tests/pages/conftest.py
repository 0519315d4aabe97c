"""Fixtures: jobs that the pages see and whose workers exist on paper only, and a visitor's page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from model.config import CHECKOUT, TrainingLimits
from model.jobs.manager import JobManager
from tests.paper import Jobs, PaperLauncher


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Taleloom folder."""
    for name in [name for name in os.environ if name.startswith("TALELOOM_") or name == "SPACE_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def jobs(home: Path) -> Iterator[Jobs]:
    """The jobs as the pages see them. Nothing tends the queue but the test, and no worker is started."""
    launcher = PaperLauncher()
    with (
        patch("model.jobs.manager.LocalLauncher", lambda: launcher),
        patch.object(JobManager, "keep_tending"),
        patch.object(JobManager, "detach", side_effect=AssertionError("pages detach nothing")),
    ):
        st.cache_resource.clear()
        st.cache_data.clear()
        yield Jobs(JobManager(launcher=launcher, limits=TrainingLimits()))
        st.cache_resource.clear()


@pytest.fixture
def visit(jobs: Jobs) -> Callable[..., AppTest]:
    """Opens a page as a new visitor: visit("finetune"), visit("job", job=id)."""

    def open_page(page: str, **query: str) -> AppTest:
        app = AppTest.from_file(str(CHECKOUT / "app.py"), default_timeout=60)
        app.switch_page(f"pages/train/{page}.py")
        for name, value in query.items():
            app.query_params[name] = value
        app.run()
        assert not app.exception
        return app

    return open_page
