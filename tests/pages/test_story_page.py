"""The story page without a browser: what a visitor does, and the words and controls that answer."""

from __future__ import annotations

import html
import os
import re
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import PropertyMock, patch

import pytest
import streamlit as st
from streamlit.runtime.context import ContextProxy
from streamlit.testing.v1 import AppTest
from streamlit.web.server.starlette.starlette_app_utils import generate_xsrf_token_string

from model.config import BUNDLED_WEIGHTS, CHECKOUT
from model.engine.cpu_backend import CpuBackend
from model.engine.engine import Engine
from model.engine.scheduler import Scheduler
from model.errors import BusyError
from model.storyteller import Story, Storyteller

A_FEW_LINES = 80  # the shortest length the page offers, in tokens


@pytest.fixture(scope="module", autouse=True)
def storytellers_rest_afterwards() -> Iterator[None]:
    yield
    st.cache_resource.clear()  # closes their engines


@pytest.fixture
def app() -> AppTest:
    return opened()


def opened(story_id: str | None = None) -> AppTest:
    """A new visitor's page."""
    app = AppTest.from_file(str(CHECKOUT / "app.py"), default_timeout=60)
    app.session_state["read_along"] = False
    if story_id:
        app.query_params["story"] = story_id
    app.run()
    assert not app.exception
    return app


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


def ask(app: AppTest, prompt: str, seed: int | None = 1, way: str = "Auto") -> str:
    """Tell a story of a few lines to its end; its page as HTML."""
    app.text_area(key="prompt").set_value(prompt)
    app.select_slider(key="length").set_value(A_FEW_LINES)
    app.number_input(key="seed").set_value(seed)
    if app.button_group:
        app.button_group(key="way").set_value(way)
    press(app, "Tell the story")
    return ended(app)


def ended(app: AppTest) -> str:
    """Look again, as the browser does, until the story has ended."""
    deadline_s = time.monotonic() + 60
    while "Stop" in labels(app):
        assert time.monotonic() < deadline_s, "the story did not end"
        time.sleep(0.05)
        app.run()
    assert not app.exception
    return page_of(app)


def page_of(app: AppTest) -> str:
    return next(element.body for element in app.html if "tl-page" in element.body and "<style>" not in element.body)


def facts_of(app: AppTest) -> str:
    return next(element.body for element in app.html if '<div class="tl-facts"' in element.body)


def plain(page: str) -> str:
    """The text of the story's HTML, the line on how it was read left out."""
    body = re.sub(r'<div class="tl-(asked|end)">.*?</div>', "", page)
    return html.unescape(re.sub(r"<[^>]+>", "", body.replace("</p><p>", "\n")))


def test_an_empty_prompt_is_answered_with_a_sentence(app):
    press(app, "Tell the story")
    assert "prompt is empty" in app.error[0].value
    assert "Tell another" not in labels(app)


def test_an_idea_is_told_to_its_end(app):
    page = ask(app, "a dragon who is afraid of fire", seed=5)
    assert "Read as an idea: “a dragon who is afraid of fire”" in page
    text = plain(page)
    assert len(text.split()) > 5 and "tl-own" not in page and "tl-caret" not in page
    assert f"{len(text.split())} words" in facts_of(app)
    assert "Seed 5<" in facts_of(app) and re.search(r"[\d,]+ tokens a second", facts_of(app))
    assert {"Tell another", "New story"} <= set(labels(app))
    assert [button.label for button in app.get("download_button")] == ["Download"]


def test_a_seed_tells_a_story_again_and_tell_another_draws_a_new_one(app):
    first = ask(app, "two mice build a boat", seed=7)
    assert ask(app, "two mice build a boat", seed=7) == first
    press(app, "Tell another")
    another = ended(app)
    assert plain(another) != plain(first)
    assert "“two mice build a boat”" in another and "Seed 7<" not in facts_of(app)


@pytest.mark.parametrize(
    ("prompt", "way", "read"),
    [
        ("a dragon who is afraid of fire", "Auto", "idea"),
        ("Once upon a time, a fox found a key", "Auto", "opening"),
        ("a dragon who is afraid of fire", "An opening", "opening"),
        ("Once upon a time, a fox found a key", "An idea", "idea"),
    ],
)
def test_the_switch_decides_how_a_prompt_is_read(app, prompt, way, read):
    page = ask(app, prompt, way=way)
    assert f"Read as an {read}" in page
    assert (f'<span class="tl-own">{prompt}</span>' in page) == (read == "opening")


@pytest.mark.parametrize("way", ["An idea", "An opening"])
def test_html_in_a_prompt_is_text(app, way):
    page = ask(app, '<script>alert("1")</script> & <img src=x onerror=alert(1)>', way=way)
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;img" in page
    assert not re.search(r"<(script|img)", page)


def test_a_newline_begins_a_paragraph(app):
    page = ask(app, "Once upon a time.\n\nThere was a fox", way="An opening")
    assert 'Once upon a time.</span></p><p><span class="tl-own">There was a fox' in page


def test_markdown_in_a_message_is_shown_literally(app):
    """Messages may quote what somebody typed, and st.error reads markdown and LaTeX."""
    with patch.object(Storyteller, "_check_visitor", side_effect=BusyError("Wait for **x** and $y$ <b>")):
        app.text_area(key="prompt").set_value("a cat")
        press(app, "Tell the story")
    assert app.error[0].value == r"Wait for \*\*x\*\* and \$y\$ \<b\>"


def test_another_session_finds_the_story_by_its_address(app):
    page = ask(app, "Once upon a time, a fox found a key", seed=3)
    again = opened(app.query_params["story"])
    assert page_of(again) == page
    assert again.text_area(key="prompt").value == "Once upon a time, a fox found a key"
    assert again.select_slider(key="length").value == A_FEW_LINES
    assert again.number_input(key="seed").value is None


def test_an_unknown_story_is_no_trace_but_a_sentence():
    app = opened("0123456789ab")
    assert "no longer remembered" in app.info[0].value
    assert "a dragon who is afraid of fire" in labels(app)


def test_an_example_tells_at_once_and_a_new_story_brings_the_examples_back(app):
    press(app, "the moon comes down to play")
    assert "“the moon comes down to play”" in page_of(app)
    assert "the moon comes down to play" not in labels(app)
    if "Stop" in labels(app):
        press(app, "Stop")
    press(app, "New story")
    assert "the moon comes down to play" in labels(app)
    assert app.text_area(key="prompt").value == "" and "story" not in app.query_params


def test_a_stopped_story_keeps_its_text_and_cannot_be_continued(app):
    with patch.object(Engine, "_guarded_step", slow(Engine._guarded_step)):
        app.text_area(key="prompt").set_value("Once upon a time, a fox found a key")
        press(app, "Tell the story")
        time.sleep(0.3)
        press(app, "Stop")
    stopped = page_of(app)
    assert "You stopped it here." in [caption.value for caption in app.caption]
    assert plain(stopped).startswith("Once upon a time, a fox found a key")
    assert len(plain(stopped)) > len("Once upon a time, a fox found a key")
    assert "Continue" not in labels(app) and "Tell another" in labels(app)
    app.run()
    assert page_of(app) == stopped


def slow(step):
    def unhurried(engine, feeds):
        time.sleep(0.03)
        step(engine, feeds)

    return unhurried


def test_a_story_that_met_its_length_goes_on(app):
    before = plain(ask(app, "Once upon a time, there was a little girl named Lily.", seed=2))
    assert app.session_state["story"].finish_reason == "length", "choose another seed: this story is too short"
    press(app, "Continue")
    after = plain(ended(app))
    assert after.startswith(before) and len(after) > len(before)


def test_telling_anew_stops_the_story_that_was_shown(app):
    """Else two unseen stories could hold the visitor's places with nothing left on the page to stop them."""
    with patch.object(Engine, "_guarded_step", slow(Engine._guarded_step)):
        app.text_area(key="prompt").set_value("a cat")
        for _ in range(4):
            press(app, "Tell the story")
            assert not app.error and "Stop" in labels(app)
        press(app, "Stop")


def test_a_prompt_that_cannot_be_told_leaves_the_running_story_alone(app):
    with patch.object(Engine, "_guarded_step", slow(Engine._guarded_step)):
        app.text_area(key="prompt").set_value("a cat")
        press(app, "Tell the story")
        app.text_area(key="prompt").set_value(" ")
        press(app, "Tell the story")
        assert "prompt is empty" in app.error[0].value and "Stop" in labels(app)
        press(app, "Stop")


def test_a_shared_story_goes_on_when_its_guest_asks_for_another(app):
    with patch.object(Engine, "_guarded_step", slow(Engine._guarded_step)):
        app.text_area(key="prompt").set_value("a cat")
        press(app, "Tell the story")
        shared = app.session_state["story"]
        guest = opened(shared.id)
        press(guest, "Tell the story")
        assert guest.session_state["story"] is not shared and not shared.is_done
        shared.stop()
        guest.session_state["story"].stop()


def test_a_visitor_is_the_same_after_a_reload():
    """The XSRF cookie is masked anew for every response; only what is under the mask stays."""
    visitors = []
    for token in (b"a visitor's key!", b"a visitor's key!", b"somebody else's."):
        cookies = {"_streamlit_xsrf": generate_xsrf_token_string(token, 1)}
        with patch.object(ContextProxy, "cookies", PropertyMock(return_value=cookies)):
            app = opened()
            ask(app, "a cat")
            visitors.append(app.session_state["story"].visitor)
    assert visitors[0] == visitors[1] != visitors[2]


def test_a_failing_engine_leaves_the_text_and_a_sentence(app):
    with patch.object(CpuBackend, "step", side_effect=RuntimeError("out of *ink*")):
        page = ask(app, "Once upon a time, a fox found a key")
    assert r"out of \*ink\*" in app.error[0].value
    assert plain(page).startswith("Once upon a time, a fox found a key")
    assert "Tell another" in labels(app)


def test_an_engine_that_had_to_start_afresh_says_so_and_tells_the_next_story(app):
    with patch.object(Scheduler, "admit", side_effect=RuntimeError("a *slip*")):
        ask(app, "a cat")
        assert "start afresh" in app.error[0].value and r"a \*slip\*" in app.error[0].value
    assert plain(ask(app, "a cat"))
    assert not app.error


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (3, "2 stories are ahead of yours."),
        (2, "1 story is ahead of yours."),
        (1, "Your story is next."),
        (0, "thinking"),
    ],
)
def test_a_waiting_story_says_how_many_are_ahead(app, place, line):
    gate = threading.Event()
    step = Engine._guarded_step

    def held(engine, feeds):
        gate.wait(30)
        step(engine, feeds)

    with patch.object(Engine, "_guarded_step", held), patch.object(Story, "place_in_queue", place):
        app.text_area(key="prompt").set_value("a cat")
        press(app, "Tell the story")
        assert line in page_of(app)
        gate.set()
        assert line not in ended(app)


def test_the_reader_is_told_what_slid_out_of_memory(app):
    ask(app, "a cat")
    assert not any("memory" in caption.value for caption in app.caption)
    with patch.object(Story, "n_forgotten_tokens", 1234):
        app.run()
    assert any("oldest 1,234 tokens" in caption.value for caption in app.caption)


def test_a_storyteller_without_ideas_offers_openings_only():
    with patch.object(Storyteller, "knows_ideas", False):
        app = opened()
        assert not app.button_group
        assert app.text_area(key="prompt").label == "The opening of a story"
        assert "Once upon a time, a fox found a key" in labels(app)
        assert "a dragon who is afraid of fire" not in labels(app)
        assert "Read as an opening" in ask(app, "a dragon who is afraid of fire")


def test_a_change_to_a_storyteller_without_ideas_keeps_the_form_working(app):
    """The switch is not drawn then, and Streamlit forgets the values of widgets that are not drawn."""
    app.button_group(key="way").set_value("An idea").run()
    with patch.object(Storyteller, "knows_ideas", False):
        app.run()
        assert "Read as an opening" in ask(app, "Once there was a fox")


@pytest.mark.parametrize("path", ["/tmp", "../weights", "~", "weights", "model", "."])
def test_the_storyteller_field_takes_no_path(app, path):
    """Visitors of a public page must not look around its disk, not even at folders that hold a model."""
    app.text_input(key="model_field").set_value(path)
    press(app, "Load")
    assert "There is no model" in app.error[0].value.replace("\\", "")
    assert app.session_state["model"] is None
    assert "tl-page" in ask(app, "a cat")


def test_a_model_of_ones_own_is_loaded_by_name(app, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    folder = Path(os.environ.get("TALELOOM_MODEL") or BUNDLED_WEIGHTS)
    (tmp_path / "models" / "mine").symlink_to(folder.resolve(), target_is_directory=True)
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path))
    app.text_input(key="model_field").set_value("mine")
    press(app, "Load")
    assert app.selectbox(key="picked").value == "mine"
    page = ask(app, "a cat", seed=4)
    assert page_of(opened(app.query_params["story"])) == page, "a reload finds it at the storyteller that told it"
    app.selectbox(key="picked").select_index(0).run()
    assert app.selectbox(key="picked").value == "", "the bundled one is shown by its name, not as nothing chosen"
    assert app.session_state["model"] is None and not app.exception
    app.selectbox(key="picked").set_value("mine").run()
    assert app.session_state["model"] == "mine" and not app.exception


def test_streamlit_collects_no_garbage_after_each_look():
    """With torch's objects a full collection took longer than the time between two looks at a story: 28 tokens a
    second instead of 430."""
    settings = tomllib.loads((CHECKOUT / ".streamlit" / "config.toml").read_text())
    assert settings["runner"]["postScriptGC"] is False


def test_a_story_to_read_along_keeps_its_pace():
    app = opened()
    app.toggle(key="read_along").set_value(True)
    ask(app, "a dragon who is afraid of fire")
    story = app.session_state["story"]
    assert story.tokens_per_second < 65 < story.possible_tokens_per_second
    assert "told at" in facts_of(app)
