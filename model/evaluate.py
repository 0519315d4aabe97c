"""All measures of a storyteller, for `taleloom evaluate`: it tells, model/evaluation measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from model.checkpoint import load_decoder, load_tokenizer, read_weights
from model.config import SamplingParams
from model.drafts import N_DRAFTS
from model.engine.cpu_backend import CpuBackend
from model.errors import InputError, TaleloomError
from model.evaluation import suite
from model.evaluation.cloze import cloze, read_pairs
from model.evaluation.following import read_ideas
from model.evaluation.loss import bits_per_byte, decoder_logits
from model.evaluation.stories import ToldStory
from model.find import choose_device, find_model
from model.storyteller import N_SLOTS, Storyteller
from model.training.data import clean, read_rows

MAX_TOKENS = 400  # room for a story to end by itself
HOT: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "min_p": 0.0}  # a known bad storyteller


def evaluate(
    model: str | None,
    device: str,
    *,
    int8: bool,
    data: tuple[Path, ...],
    with_cloze: bool,
    n_stories: int,
    corpus: tuple[Path, ...],
    real: Path | None,
    n_openings: int,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Any], dict[str, list[ToldStory]]]:
    """Measure a storyteller.

    Args:
        int8: score the rounded weights of the CPU path instead of float32.
        data: files of stories to predict; the results go by their names.
        n_stories: how many stories to tell from the ideas of the evaluation, 0 for none.
        corpus: files of training text, for what stories copy.
        real: a file of real stories, to compare with and to continue.
        n_openings: how many of these to continue.

    Returns:
        The results (see model/evaluation/suite.py), and the stories told, by kind.

    Raises:
        InputError: a file is missing or has too few stories, or the storyteller knows no ideas.
    """
    for path in corpus:
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
    if (corpus or real) and not n_stories:
        raise InputError("--corpus and --real are for measuring stories. Say how many: --stories 200.")
    texts = {path.stem: [row["text"] for row in read_rows(path)] for path in data}
    if len(texts) < len(data):
        raise InputError("Two files of --data have one name. Rename one: the results go by it.")
    real_texts = [clean(row["text"]) for row in read_rows(real)] if real else []
    if n_stories:
        suite.require_extra()
    folder = find_model(model, report)
    decoder = load_decoder(folder, choose_device(device))
    tokenizer = load_tokenizer(folder, decoder.config)
    if n_stories and not tokenizer.knows_ideas:
        raise InputError("This storyteller was not trained on ideas, so --stories cannot ask it for any.")
    if real:
        continued, others = suite.split_openings(real_texts, n_openings, tokenizer, MAX_TOKENS)

    rounded = None
    if int8:
        weights = read_weights(folder, decoder.config)
        rounded = CpuBackend(decoder.config, weights, n_slots=1, n_ids=tokenizer.vocab_size).logits
    results: dict[str, Any] = {"model": model or "bundled", "weights": "int8" if int8 else "float32"}
    results["sources"] = {
        name: bits_per_byte(decoder, tokenizer, of_source, progress=progress, logits=rounded)
        for name, of_source in texts.items()
    }
    if with_cloze:
        results["cloze"] = cloze(read_pairs(), tokenizer, rounded or decoder_logits(decoder))
    told: dict[str, list[ToldStory]] = {}
    if n_stories:
        training_text = (lambda: (clean(row["text"]) for path in corpus for row in read_rows(path))) if corpus else None
        ideas = [idea for _, idea in zip(range(n_stories), cycle(read_ideas()), strict=False)]
        results["settings"] = {
            **asdict(SamplingParams()),
            "max_tokens": MAX_TOKENS,
            "seed": "1, 2, ...",
            "drafts": N_DRAFTS,
        }
        with Storyteller.load(str(folder), device) as storyteller:
            report(f"Telling {n_stories} stories ...")
            prompts = [idea.idea for idea in ideas]
            told["ideas"] = _tell_all(storyteller, prompts, "idea", n_drafts=N_DRAFTS)
            told["first_drafts"] = _tell_all(storyteller, prompts, "idea")
            if real:
                report(f"Continuing {len(continued)} real stories, twice ...")
                prompts = [split.opening for split in continued]
                told["continuations"] = _tell_all(storyteller, prompts, "opening")
                told["hot"] = _tell_all(storyteller, prompts, "opening", 1, **HOT)
        report("Measuring ...")
        for kind in ("ideas", "first_drafts"):
            results[kind] = suite.measure_ideas(told[kind], ideas, training_text)
        if real:
            results["real"] = suite.measure_real(real_texts, n_stories, training_text)
            results |= suite.measure_continuations(told["continuations"], told["hot"], continued, others)
    return results, told


def _tell_all(
    storyteller: Storyteller, prompts: list[str], mode: Literal["idea", "opening"], n_drafts: int = 1, **settings: Any
) -> list[ToldStory]:
    """Tell a story of each prompt, the i-th (from 1) with seed i, or the best of the seeds n (i - 1) + 1 to n i."""
    told = []
    params = SamplingParams(max_tokens=MAX_TOKENS, **settings)
    size = N_SLOTS // n_drafts  # no more than are written at once: the queue is bounded
    for first in range(0, len(prompts), size):
        batch = [
            storyteller.tell(prompt, params, mode, seeds=range(number * n_drafts + 1, (number + 1) * n_drafts + 1))
            for number, prompt in enumerate(prompts[first : first + size], first)
        ]
        for story in batch:
            story.wait()
            if story.error:
                raise TaleloomError(story.error)
            assert story.params.seed is not None
            ended = story.finish_reason == "stop"
            text = story.continuation.strip()
            told.append(ToldStory(story.prompt, mode, story.params.seed, text, story.n_tokens, ended))
    return told
