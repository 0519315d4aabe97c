"""The door: stories as readers ask for them."""

import gc
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from model.config import SamplingParams
from model.errors import BusyError, EngineError, InputError
from model.storyteller import Storyteller

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


@pytest.fixture
def endless(tiny_model):
    """A storyteller that never writes its end token, a step every few milliseconds."""
    with Storyteller.load(str(tiny_model), device="cpu") as storyteller:
        storyteller.engine._eos_id = -1
        yield lambda **settings: storyteller.tell(
            "Ben", SamplingParams(max_tokens=4000, seed=1), mode="opening", pace=200, **settings
        )


def test_stop_keeps_the_text(endless):
    story = endless()
    next(iter(story))
    story.stop()
    story.stop()
    assert story.wait(10)
    assert story.finish_reason == "cancelled" and story.text.startswith("Ben") and story.continuation
    with pytest.raises(InputError, match="length limit"):
        story.extend(10)


def test_leaving_the_iterator_stops_the_story(endless):
    story = endless()
    for _ in story:
        break
    gc.collect()
    assert story.wait(10) and story.finish_reason == "cancelled"


def test_two_readers_who_press_continue_continue_once(storyteller):
    """Twice in the engine, a story's second copy lost its slot and the kernels read beyond their arrays."""
    for _ in range(20):
        story = storyteller.tell("Ben", replace(PARAMS, max_tokens=5), mode="opening")
        story.wait(30)
        barrier, refused = threading.Barrier(4), []

        def press(story=story, barrier=barrier, refused=refused):
            barrier.wait()
            try:
                story.extend(5)
            except InputError as error:
                refused.append(error)

        presses = [threading.Thread(target=press) for _ in range(4)]
        for thread in presses:
            thread.start()
        for thread in presses:
            thread.join()
        assert story.wait(30) and story.finish_reason == "length"
        assert len(refused) + (story.n_tokens - 5) // 5 == 4


def test_an_iterator_that_ended_leaves_a_continued_story_alone(storyteller):
    story = storyteller.tell("Ben", replace(PARAMS, max_tokens=5), mode="opening")
    pieces = iter(story)
    while story.finish_reason is None or next(pieces, None) is not None:
        pass
    story.extend(5)
    assert next(pieces, None) is None
    assert story.wait(30) and story.finish_reason == "length" and story.n_tokens == 10


def test_extend_goes_on_at_the_length_limit_only(storyteller):
    story = storyteller.tell("Ben", replace(PARAMS, max_tokens=10), mode="opening")
    story.wait(30)
    before = story.text
    story.extend(10)
    assert story.wait(30) and story.text.startswith(before) and story.n_tokens == 20
    whole = storyteller.tell("Ben", PARAMS, mode="opening")
    whole.wait(30)
    assert story.text == whole.text


def test_one_visitor_may_run_a_limited_number(endless):
    first = endless(visitor="me")
    storyteller = first._storyteller
    storyteller.max_running_per_visitor = 1
    with pytest.raises(BusyError, match="still being told"):
        endless(visitor="me")
    endless(visitor="you")
    first.stop()
    first.wait(10)
    endless(visitor="me")
    storyteller.close()
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


def test_who_waits_while_a_story_cannot_be_continued_is_not_left_waiting(tiny_model, monkeypatch):
    with Storyteller.load(str(tiny_model), "cpu") as storyteller:
        story = storyteller.tell("Ben", SamplingParams(max_tokens=3, seed=1), mode="opening")
        assert story.wait(30) and story.finish_reason == "length"
        waiting, waited = threading.Event(), []

        def refuse(_):
            thread.start()
            waiting.wait(10)
            time.sleep(0.1)  # until it waits inside
            raise BusyError("full")

        def wait():
            waiting.set()
            waited.append(story.wait(10))

        thread = threading.Thread(target=wait)
        monkeypatch.setattr(storyteller, "resume", refuse)
        with pytest.raises(BusyError):
            story.extend(10)
        thread.join(5)
        assert waited == [True] and story.finish_reason == "length"


def test_a_forgotten_story_that_is_continued_is_found_again(tiny_model, monkeypatch):
    monkeypatch.setattr("model.storyteller.N_REMEMBERED", 1)
    with Storyteller.load(str(tiny_model), "cpu") as storyteller:
        stories = []
        for seed in range(4):
            stories.append(storyteller.tell("Ben", SamplingParams(max_tokens=3, seed=seed), mode="opening"))
            assert stories[-1].wait(30)
        assert storyteller.story(stories[0].id) is None
        stories[0].extend(3)
        assert storyteller.story(stories[0].id) is stories[0] and stories[0].wait(30)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_does_not_work_gives_way_to_the_cpu_unless_it_was_asked_for(tiny_model, monkeypatch, device):
    def fail(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("model.storyteller.choose_device", lambda _: "cuda")
    monkeypatch.setattr("model.checkpoint.load_decoder", fail)
    if device == "cuda":
        with pytest.raises(InputError, match="no kernel image"):
            Storyteller.load(str(tiny_model), device)
        return
    with Storyteller.load(str(tiny_model), device) as storyteller:
        story = storyteller.tell("Ben", SamplingParams(max_tokens=5), mode="opening")
        assert story.wait(60) and not story.error and storyteller.device == "cpu"


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
