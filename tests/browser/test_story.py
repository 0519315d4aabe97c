"""The story page as a visitor meets it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
TEXT = ".tl-page p:not(.tl-waiting)"


def ask(page: Page, prompt: str, length_key: str) -> None:
    """Type a prompt, move the length to one end (Home or End) and press Tell."""
    page.get_by_role("slider", name="Length").focus()
    page.keyboard.press(length_key)
    page.get_by_role("textbox").first.fill(prompt)
    page.get_by_role("button", name="Tell the story").click()
    page.locator(".tl-page").wait_for()


def text_of(page: Page) -> str:
    """The story's own text: not how it was read, no waiting line, no ornament."""
    return "\n".join(page.locator(TEXT).all_inner_texts())


def wait_for_growth(page: Page, beyond: str, by: int = 10) -> str:
    """The text once it has grown by some characters."""
    long_enough = "([css, n]) => [...document.querySelectorAll(css)].map(p => p.innerText).join(' ').length > n"
    page.wait_for_function(long_enough, arg=[TEXT, len(beyond) + by])
    return text_of(page)


def test_a_story_grows_survives_a_reload_and_keeps_its_text_when_stopped(page):
    ask(page, "a dragon who is afraid of fire", "End")
    early = wait_for_growth(page, "")
    assert page.locator(".tl-asked").inner_text() == "Read as an idea: “a dragon who is afraid of fire”"
    url = page.url
    assert "?story=" in url
    later = wait_for_growth(page, early)
    assert later.startswith(early)

    page.reload()
    page.locator(".tl-page").wait_for()
    reloaded = wait_for_growth(page, later)
    assert reloaded.startswith(later) and page.url == url
    assert page.get_by_role("textbox").first.input_value() == "a dragon who is afraid of fire"

    page.get_by_role("button", name="Stop").click()
    page.get_by_text("You stopped it here.").wait_for()
    stopped = text_of(page)
    assert stopped.startswith(reloaded)
    page.wait_for_timeout(700)
    assert text_of(page) == stopped
    page.reload()
    page.get_by_role("button", name="Tell another").wait_for(timeout=60_000)
    assert text_of(page) == stopped


def test_who_is_quick_gets_the_usual_settings_and_can_stop(chromium, app_url):
    """The browser had not heard of the session's values when a click interrupted the page's first run: stories came
    without a pace, at times with a top-p of 0.01. And a Stop that fell into a redrawing lost the line that confirms it.
    Races: some of five visits lost them.
    """
    for _ in range(5):
        context = chromium.new_context(base_url=app_url)
        page = context.new_page()
        page.goto("/")
        page.get_by_role("button", name="Tell the story").wait_for()
        ask(page, "a quick fox", "End")
        wait_for_growth(page, "")
        page.get_by_text("Finer settings").click()
        shown = [page.get_by_role("spinbutton", name=name).input_value() for name in ("Top-p", "Repetition penalty")]
        assert [float(value) for value in shown] == [0.95, 1.0]
        assert page.get_by_role("switch", name="At a pace to read along").is_checked()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("You stopped it here.").wait_for()
        context.close()


def test_typed_markup_is_shown_literally(page):
    typed = "<b>bold</b> $x^2$ **y** <img src=x onerror=alert(1)>"
    page.on("dialog", lambda dialog: pytest.fail("the prompt ran as a script"))
    page.get_by_role("radio", name="An opening").click()
    ask(page, typed, "Home")
    page.get_by_role("button", name="Tell another").wait_for(timeout=60_000)
    assert page.locator(".tl-own").first.inner_text() == typed
    assert page.locator(".tl-page").locator("b, strong, img, .katex").count() == 0
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    saved = Path(download.value.path()).read_text()
    assert saved.startswith(typed) and len(saved) > len(typed)
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == saved


def test_a_phone_never_scrolls_sideways(page, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    too_wide = (
        "() => [document.documentElement, document.querySelector('.stMain')].some(e => e.scrollWidth > innerWidth)"
    )
    assert not page.evaluate(too_wide)
    ask(page, "Once upon a time there was a w" + "o" * 120 + "lf.", "Home")
    page.get_by_role("textbox").first.fill("my next idea")
    page.get_by_role("button", name="Tell another").wait_for(timeout=60_000)
    assert page.get_by_role("textbox").first.input_value() == "my next idea", "typed while a story grew and ended"
    assert not page.evaluate(too_wide)
    page.get_by_text("Finer settings").click()
    page.get_by_role("spinbutton", name="Seed").wait_for()
    assert not page.evaluate(too_wide)
    page.screenshot(path=tmp_path / "phone.png")


def test_stop_stays_in_reach_and_a_new_story_brings_the_examples_back(page):
    page.set_viewport_size({"width": 1100, "height": 560})
    page.get_by_role("button", name="the moon comes down to play").click()
    wait_for_growth(page, "", by=100)
    assert page.get_by_role("textbox").first.input_value() == "the moon comes down to play"
    stop = page.get_by_role("button", name="Stop")
    box = stop.bounding_box()
    assert box["y"] + box["height"] <= 560, "it floats over a story that outgrows the window"
    stop.click()
    page.get_by_role("button", name="New story").click()
    page.get_by_role("button", name="the moon comes down to play").wait_for()
    assert "story=" not in page.url and page.locator(".tl-page").count() == 0


def test_a_told_story_leaves_a_picture(page, tmp_path):
    """TALELOOM_SCREENSHOT=docs/screenshot.png makes the picture in the docs."""
    page.set_viewport_size({"width": 1100, "height": 1080})
    page.get_by_role("button", name="Once upon a time, a fox found a key").click()
    page.get_by_role("button", name="Tell another").wait_for(timeout=60_000)
    page.mouse.move(5, 500)  # nothing hovered
    page.wait_for_timeout(300)
    path = Path(os.environ.get("TALELOOM_SCREENSHOT") or tmp_path / "story.png")
    page.screenshot(path=path)
    assert path.stat().st_size > 20_000  # an empty page takes far less
