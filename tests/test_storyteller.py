"""The door: stories as readers ask for them."""

import gc
import subprocess
import sys
from dataclasses import replace

import pytest

from model.config import SamplingParams
from model.errors import BusyError, EngineError, InputError, ModelError
from model.storyteller import Storyteller, find_model, guess_mode, plain_text

PARAMS = SamplingParams(max_tokens=20, seed=7)


@pytest.fixture(scope="module")
def storyteller(tiny_model):
    with Storyteller.load(str(tiny_model), device="cpu", n_slots=4) as storyteller:
        yield storyteller


def test_pieces_add_up_to_the_text(storyteller):
    story = storyteller.tell("Mia found", PARAMS, mode="opening")
    pieces = list(story)
    assert story.text == "Mia found" + "".join(pieces) and "".join(pieces)
    assert story.n_tokens == 20 and story.finish_reason == "length" and story.is_done
    assert story.tokens_per_second > 0
    assert storyteller.story(story.id) is story


def test_an_idea_is_not_part_of_the_story(storyteller):
    story = storyteller.tell("a fox", PARAMS, mode="idea")
    story.wait(30)
    assert story.mode == "idea" and story.text == story.continuation


def test_a_seed_means_a_story(storyteller):
    """Whoever else is generating: the same seed alone and among others."""
    alone = storyteller.tell("Tom lost", PARAMS, mode="opening")
    alone.wait(30)
    others = [storyteller.tell("Grandma", replace(PARAMS, seed=seed), mode="opening") for seed in range(5)]
    again = storyteller.tell("Tom lost", PARAMS, mode="opening")
    again.wait(30)
    assert again.text == alone.text
    assert len({story.text for story in others if story.wait(30)}) > 1


def test_a_drawn_seed_is_shown_and_tells_the_story_again(storyteller):
    story = storyteller.tell("Tom lost", replace(PARAMS, seed=None), mode="opening")
    story.wait(30)
    again = storyteller.tell("Tom lost", story.params, mode="opening")
    again.wait(30)
    assert story.params.seed is not None and again.text == story.text


def test_stop_keeps_the_text(storyteller):
    story = storyteller.tell("Ben", SamplingParams(max_tokens=4000, seed=1), mode="opening")
    next(iter(story))
    story.stop()
    story.stop()
    assert story.wait(10)
    assert story.finish_reason in ("cancelled", "stop") and story.text.startswith("Ben") and story.continuation


def test_leaving_the_iterator_stops_the_story(storyteller):
    story = storyteller.tell("Ben", SamplingParams(max_tokens=4000, seed=3, repetition_penalty=1.0), mode="opening")
    for _ in story:
        break
    gc.collect()
    assert story.wait(10) and story.n_tokens < 4000


def test_extend_goes_on_at_the_length_limit_only(storyteller):
    story = storyteller.tell("Ben", replace(PARAMS, max_tokens=10), mode="opening")
    story.wait(30)
    before = story.text
    story.extend(10)
    assert story.wait(30) and story.text.startswith(before) and story.n_tokens == 20
    whole = storyteller.tell("Ben", PARAMS, mode="opening")
    whole.wait(30)
    assert story.text == whole.text
    story.stop()
    stopped = storyteller.tell("Ben", SamplingParams(max_tokens=4000, seed=1), mode="opening")
    stopped.stop()
    stopped.wait(10)
    if stopped.finish_reason != "length":
        with pytest.raises(InputError, match="length limit"):
            stopped.extend(10)


def test_one_visitor_may_run_a_limited_number(tiny_model):
    with Storyteller.load(str(tiny_model), device="cpu") as storyteller:
        storyteller.max_running_per_visitor = 1
        long = SamplingParams(max_tokens=4000, seed=1)
        first = storyteller.tell("Ben", long, mode="opening", visitor="me")
        with pytest.raises(BusyError, match="still being told"):
            storyteller.tell("Ben", long, mode="opening", visitor="me")
        storyteller.tell("Ben", long, mode="opening", visitor="you").stop()
        first.stop()
        first.wait(10)
        storyteller.tell("Ben", long, mode="opening", visitor="me").stop()
    with pytest.raises(EngineError):
        storyteller.tell("Ben", mode="opening")


@pytest.mark.parametrize(
    ("prompt", "mode", "words"),
    [
        ("", None, "empty"),
        (" \n\t ", "idea", "empty"),
        ("x" * 1_000_000, "opening", "1,000,000"),
        ("word " * 200, "idea", "tokens"),
        ("a \ud800", "opening", "broken character"),
    ],
)
def test_unusable_prompts_get_a_sentence(storyteller, prompt, mode, words):
    with pytest.raises(InputError, match=words):
        storyteller.tell(prompt, PARAMS, mode=mode)


@pytest.mark.parametrize("prompt", ["🐉🔥", "a\0b", "<s></s><idea>", "<b>bold</b> $x^2$", "é" * 500, "\u2581"])
def test_odd_prompts_are_only_text(storyteller, prompt):
    story = storyteller.tell(prompt, PARAMS, mode="opening")
    assert story.wait(30) and not story.error and story.text.startswith(prompt)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"max_tokens": 1_000_000},
        {"max_tokens": 2.5},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": float("inf")},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_unusable_settings_name_themselves(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        SamplingParams(**settings)


def test_temperature_zero_needs_no_luck(storyteller):
    texts = set()
    for seed in range(3):
        story = storyteller.tell("Mia", SamplingParams(max_tokens=15, temperature=0, seed=seed), mode="opening")
        story.wait(30)
        texts.add(story.text)
    assert len(texts) == 1


def test_typographic_quotes_read_as_plain_ones():
    assert plain_text("“Oh!” — it’s…\r\n\r\nBen") == '"Oh!" - it\'s...\nBen'


@pytest.mark.parametrize(
    ("prompt", "mode"),
    [
        ("a dragon who is afraid of fire", "idea"),
        ("A dragon who is afraid of fire", "idea"),
        ("Tell me a story about a pirate.", "idea"),
        ("Use the words: kite, moon, string", "idea"),
        ("friends", "idea"),
        ("Once upon a time, a fox found", "opening"),
        ("There was a tall box in the kitchen.", "opening"),
        ('"There is a pancake on the ceiling," said Nadia', "opening"),
        ("The old swing tasted like honey.", "opening"),
        ("Mia ran. She did not look back", "opening"),
    ],
)
def test_ideas_and_openings_are_told_apart(prompt, mode):
    assert guess_mode(prompt) == mode


def test_an_unknown_model_says_where_was_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="no model 'nobody'"):
        find_model("nobody")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert find_model("mine") == tmp_path / "models" / "mine"
    with pytest.raises(ModelError):
        find_model("../mine/../../etc")


def test_cuda_without_cuda_says_so(tiny_model):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match="no CUDA"):
        Storyteller.load(str(tiny_model), device="cuda")


def test_the_door_opens_without_torch():
    """Pages and the CLI import the door at start; torch takes a second, so it waits until a model is loaded."""
    code = "import sys, model.storyteller; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
