"""Several seeds are tried and the story that keeps best to its prompt is told."""

import threading

import pytest

from model.config import SamplingParams
from model.drafts import N_DRAFTS, score, subject_words
from model.engine.request import FinishReason
from model.storyteller import Storyteller

IDEA = "a fox who finds a red kite"
KEPT = (
    "A fox lived in the wood. One day the fox found a kite. It was red. He ran and ran with it.\n"
    "The wind took it up. A bird saw it and laughed. Then the string broke and it fell into a tree.\n"
    "The fox was sad, but the bird brought the kite down. The fox hugged his red kite."
)
LOST = KEPT.replace("fox hugged his red kite", "bird sang").replace("brought the kite down", "sang")
PARAMS = SamplingParams(max_tokens=40, temperature=1.5, top_p=1, min_p=0)


@pytest.fixture
def storyteller(tiny_model):
    with Storyteller.load(str(tiny_model), "cpu") as loaded:
        yield loaded


def test_subject_words_are_what_the_story_is_about():
    assert subject_words("Tell me a story about a penguin who finds a trumpet.") == ["penguin", "trumpet"]
    assert subject_words("Use the words: goat, drawer, hill") == ["goat", "drawer", "hill"]
    assert subject_words("a story, please") == []


@pytest.mark.parametrize(
    ("worse", "ended"),
    [
        (LOST, True),  # hero and thing do not reach the end
        (KEPT + " The fox hugged his red kite." * 4, True),  # says one thing again and again
        (KEPT.replace("A bird saw it and laughed", "He ran and ran with it and ran and ran with it"), True),  # circles
        (KEPT, False),  # cut off
        ("The fox hugged his red kite.", True),  # no story
        ("", True),
    ],
)
def test_what_reads_worse_scores_lower(worse, ended):
    assert score(IDEA, KEPT, ended=True) > score(IDEA, worse, ended)


def test_endings_of_words_do_not_matter():
    assert score("foxes flying kites", KEPT.replace("found", "flew"), True) == pytest.approx(
        score("fox fly kite", KEPT.replace("found", "flew"), True)
    )


def test_the_best_of_the_seeds_is_told_and_its_seed_tells_it_again(storyteller, monkeypatch):
    alone = {}
    for seed in range(10, 18):
        alone[seed] = storyteller.tell("the fox", PARAMS, seeds=[seed])
        assert alone[seed].wait(60) and alone[seed].params.seed == seed
    best = max(alone, key=lambda seed: score("the fox", alone[seed].continuation, alone[seed].finish_reason == "stop"))
    story = storyteller.tell("the fox", PARAMS, seeds=range(10, 18))
    assert story.wait(60) and story.params.seed == best and story.text == alone[best].text
    assert story.finish_reason == alone[best].finish_reason


def test_a_seed_is_taken_as_it_is(storyteller):
    story = storyteller.tell("the fox", SamplingParams(max_tokens=5, seed=3))
    assert story.wait(60) and story.params.seed == 3 and not story._drafts


def test_fewer_drafts_when_many_stories_are_running(tiny_model, monkeypatch):
    with Storyteller.load(str(tiny_model), "cpu", n_slots=4) as storyteller:
        tried = []
        submit = storyteller.engine.submit
        monkeypatch.setattr(
            storyteller.engine, "submit", lambda r, accepted=False: (tried.append(r), submit(r, accepted))
        )
        assert storyteller.tell("the fox", PARAMS).wait(60)
        assert len(tried) == 2 + 1  # half of the four slots, then the story itself


def test_a_large_model_or_a_long_story_gets_fewer_drafts(storyteller, monkeypatch):
    """Eight drafts of a model of 85 million weights kept a reader waiting for two seconds."""
    assert storyteller._affordable_drafts(320) >= N_DRAFTS
    monkeypatch.setattr(type(storyteller.config), "n_parameters", 8_300_000)
    assert storyteller._affordable_drafts(320) >= N_DRAFTS
    monkeypatch.setattr(type(storyteller.config), "n_parameters", 85_000_000)
    assert storyteller._affordable_drafts(320) <= 2
    story = storyteller.tell("the fox", PARAMS)
    assert story.wait(60) and story.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_drafts_that_cannot_be_compared_do_not_cost_the_story(storyteller, monkeypatch):
    """An exception on the engine's thread is logged, and whoever waited for the story would wait for ever."""
    monkeypatch.setattr("model.storyteller.score", lambda *_, **__: 1 / 0)
    story = storyteller.tell("the fox", PARAMS, seeds=[7, 8])
    assert story.wait(60) and story.params.seed == 7 and story.text


def test_a_story_stopped_among_its_drafts_ends(storyteller):
    story = storyteller.tell("the fox", SamplingParams(max_tokens=4000), pace=5)
    story.stop()
    assert story.wait(60) and story.finish_reason is FinishReason.CANCELLED


def test_closing_among_drafts_leaves_nobody_waiting(tiny_model):
    storyteller = Storyteller.load(str(tiny_model), "cpu")
    story = storyteller.tell("the fox", SamplingParams(max_tokens=4000))
    reader = threading.Thread(target=lambda: list(story))
    reader.start()
    storyteller.close()
    reader.join(60)
    assert not reader.is_alive() and story.is_done


def test_retiring_among_drafts_tells_the_story(tiny_model):
    storyteller = Storyteller.load(str(tiny_model), "cpu")
    story = storyteller.tell("the fox", SamplingParams(max_tokens=300))
    storyteller.retire()
    assert story.wait(60) and story.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
