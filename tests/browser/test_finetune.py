"""Teaching a storyteller the sample set as a visitor does it, with a real worker."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser


def start(page: Page, name: str, **numbers: int) -> None:
    """Start a fine-tune on the sample set; `numbers` go into the drawer's fields."""
    page.goto("/finetune")
    page.get_by_text("34 stories to learn from, 10 held out").wait_for()
    if numbers:
        page.get_by_text("For experts").click()
    for label, number in numbers.items():
        field = page.get_by_role("spinbutton", name=label.replace("_", " "))
        field.fill(str(number))
        field.press("Tab")
    page.get_by_role("textbox", name="Name of the new storyteller").fill(name)
    page.get_by_role("button", name="Start learning").click()
    page.locator("h2", has_text=name).wait_for()


def picture(page: Page, tmp_path: Path, name: str) -> None:
    """TALELOOM_PICTURES=FOLDER keeps them there."""
    page.mouse.move(5, 500)
    page.wait_for_timeout(500)
    path = Path(os.environ.get("TALELOOM_PICTURES") or tmp_path) / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 20_000


def wide(page: Page) -> bool:
    return page.evaluate(
        "() => [document.documentElement, document.querySelector('.stMain')].some(e => e.scrollWidth > innerWidth)"
    )


def test_the_sample_is_learned_watched_and_written_with(page, tmp_path):
    start(page, "short", Steps_at_most=6, Evaluations=2)
    address = page.url
    assert "job=" in address
    picture(page, tmp_path, "starting")
    page.get_by_text("Before", exact=True).first.wait_for(timeout=90_000)  # the test ideas, as they were told before
    page.get_by_text(re.compile("step [1-6] of 6")).wait_for(timeout=90_000)
    page.reload()  # which ends nothing
    page.get_by_text("What came of it").wait_for(timeout=180_000)
    assert page.url == address
    assert page.locator(".tl-sample").count() == 6 and page.locator("canvas, .vega-embed svg").count() >= 2
    assert page.get_by_text("After step 6", exact=True).count() == 3
    picture(page, tmp_path, "done")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert not wide(page)
    page.set_viewport_size({"width": 1100, "height": 900})

    page.get_by_role("button", name="Write with short").click()
    page.get_by_role("button", name="Tell the story").wait_for()
    page.get_by_role("button", name="Storyteller", exact=True).click()
    page.get_by_text("A new storyteller is here.").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("textbox").first.fill("a goat eats the map")
    page.get_by_role("slider", name="Length").focus()
    page.keyboard.press("Home")
    page.get_by_role("button", name="Tell the story").click()
    page.get_by_role("button", name="Tell another").wait_for(timeout=60_000)
    assert len(page.locator(".tl-page").inner_text().split()) > 20
    page.goto("/models")
    page.get_by_role("button", name="Take it home").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Folder (ZIP)").click()
    assert Path(download.value.path()).read_bytes().startswith(b"PK")
    picture(page, tmp_path, "storytellers")


def test_a_job_is_paused_resumed_cancelled_and_deleted(page):
    start(page, "stopped")
    page.get_by_text(re.compile(r"step \d+ of")).wait_for(timeout=90_000)
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").wait_for()
    page.get_by_text("It is paused.").wait_for(timeout=60_000)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("It was cancelled.").wait_for(timeout=60_000)
    page.get_by_role("button", name="Delete").last.click()  # while it is drawn anew, the old one is there too
    page.get_by_role("button", name="Delete it").click()
    page.get_by_role("button", name="Start learning").wait_for()
    assert page.get_by_role("link", name="stopped").count() == 0


@pytest.mark.soak
def test_a_quick_taste_of_the_sample_is_learned_within_minutes(page):
    start(page, "taste")
    page.get_by_text("What came of it").wait_for(timeout=600_000)
    numbers = page.locator('[data-testid="stMetricValue"], [data-testid="stMetricDelta"]').all_inner_texts()
    own, own_change, original, original_change = (float(text.replace("−", "-")) for text in numbers[:4])
    assert own_change < -0.15 * (own - own_change), "held-out pages of the log are told much better"
    assert original_change < 0.05 * (original - original_change), "and its old stories nearly as well"
