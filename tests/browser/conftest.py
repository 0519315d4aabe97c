"""A real browser on a real server: the app as a subprocess with a home of its own, Chromium through playwright."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from model.config import CHECKOUT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
# A step of the engine takes at least 80 ms here: a fast machine would end a story before anybody could press Stop.
# Not for the README's picture, which is to show what readers see.
STEP_S = 0 if os.environ.get("TALELOOM_SCREENSHOT") else 0.08
UNHURRIED_APP = f"""
import sys, time
from model.engine.engine import Engine
from streamlit.runtime.pages_manager import PagesManager
from streamlit.web import cli

PagesManager.uses_pages_directory = False  # as pages/shared/serve.py
step = Engine._guarded_step

def unhurried(engine, feeds):
    if any(feed.request.pace for feed in feeds):  # drafts are nothing to look at
        time.sleep({STEP_S})
    step(engine, feeds)

Engine._guarded_step = unhurried
sys.argv = ["streamlit", "run", "app.py", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(scope="session")
def app_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running app's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    folder = tmp_path_factory.mktemp("app")
    options = ["--server.port", str(port), "--server.address", "127.0.0.1", "--server.headless", "true"]
    environment = {**os.environ, "TALELOOM_HOME": str(folder / "home"), "TALELOOM_DEVICE": "cpu"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", UNHURRIED_APP, *options]
        app = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                assert app.poll() is None and time.monotonic() < deadline_s, (folder / "log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        app.terminate()
        try:
            app.wait(10)
        except subprocess.TimeoutExpired:
            app.kill()
            app.wait()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no Chromium at {CHROMIUM}")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, app_url: str) -> Iterator[Page]:
    """A fresh visitor's page, opened; at the end nothing may have been asked of another host, no script have failed."""
    context = chromium.new_context(
        viewport={"width": 1100, "height": 900}, base_url=app_url, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(20_000)
    page = context.new_page()
    foreign: list[str] = []
    failures: list[str] = []
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((app_url, "data:", "blob:")) else foreign.append(asked.url),
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto("/")
    page.get_by_role("button", name="Tell the story").wait_for()
    yield page
    context.close()
    assert not foreign
    assert not failures
