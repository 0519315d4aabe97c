"""What a worker does: fine-tune as its folder says, tell the test ideas now and then, and hand over the storyteller.

Torch is imported only when it begins, so that the worker can say first that it has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.checkpoint import write_atomically
from model.config import FineTuneSettings, SamplingParams
from model.errors import InputError, TaleloomError
from model.jobs.record import Job, Row, read_lines, read_request, read_result, read_stories
from model.own_models import OwnModel, add_model, models_folder, own_models
from model.text import words
from model.training.data import is_held_out, read_rows

if TYPE_CHECKING:
    from model.decoder import Decoder
    from model.tokenizer import Tokenizer
    from model.training.finetune import FineTune, Outcome

ORIGINALS = Path(__file__).parent.parent / "training" / "stories.parquet"
TEST_IDEAS = ("a dragon who is afraid of fire", "a lost kitten", "two mice build a boat")
SAMPLE_TOKENS = 240
N_MEMORY_SAMPLES = 50
MAX_NAME = 60  # see own_models.NAME
BUNDLED_NAME = "Llama-Taleloom-11M"
BUNDLED_LICENCE = """license: other
license_name: apache-2.0-with-llama-3.1-community-terms
license_link: https://www.llama.com/llama3_1/license/
"""
TERMS_BEGIN = """
## Licence

Built with Llama: it was made from """
BUNDLED_TERMS = f"""{TERMS_BEGIN}{BUNDLED_NAME}, whose weights are offered under the Apache License 2.0, subject to
the Llama 3.1 Community License for what was learned from text that Llama 3.1 wrote: Llama 3.1 is licensed under the
Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved. Who passes this storyteller on keeps
these terms, and puts "Llama" at the beginning of its name.
"""


def read_originals() -> list[Row]:
    """The stories that come with Taleloom: its storyteller learned from most in "train", from none in "test"."""
    return [  # they lie there clean (tested)
        {"text": row["text"], "prompt": row["prompt"], "split": "test" if is_held_out(row["text"]) else "train"}
        for row in read_rows(ORIGINALS)
    ]


def fine_tune(
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], Literal["pause", "cancel"] | None],
) -> Outcome:
    """Run the job in `folder` to its end or until it is to stop; at its end there is a new storyteller.

    Raises:
        TaleloomError: it cannot be trained; the message says what to do.
        OSError: a file could not be written.
    """
    # Threads that spin while they wait take the core from readers (and a shared core from themselves).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from model.checkpoint import load_decoder, load_tokenizer, read_config, save_model
    from model.find import choose_device, find_model
    from model.training.finetune import FineTune

    if read_result(folder):  # killed between the hand-over and its last word
        return "done"
    job, clock = read_request(folder), Clock(folder / "clock.json")
    rows = read_stories(folder)
    # A copy, which the job learns from to its end (replayed stories are asked for what the base says of them), so the
    # base may be renamed or deleted.
    base = folder / "base"
    if not (base / "config.json").is_file():
        # Paths are absolute: a storyteller of one's own may be called "docs".
        is_path = job.base is not None and Path(job.base).is_absolute()
        original = find_model(job.base, folders=is_path)
        save_model(base, load_decoder(original), load_tokenizer(original, read_config(original)))
    device = choose_device(job.device)
    tokenizer: Tokenizer
    ideas = job.test_ideas or TEST_IDEAS

    def tell(decoder: Decoder) -> list[dict[str, Any]]:
        texts = tell_all(decoder, tokenizer, ideas, [1] * len(ideas))
        return [{"idea": idea, "seed": 1, "text": text} for idea, text in zip(ideas, texts, strict=True)]

    def record(figures: dict[str, Any]) -> None:
        if figures.get("evaluation"):  # a checkpoint follows
            clock.save()
        report(figures)

    run = FineTune(folder, base, rows, job.settings, read_originals(), device, record, should_stop, tell)
    tokenizer = run.tokenizer
    outcome = run.run()
    clock.save()
    if outcome == "done":
        report({"message": "It has learned; what it knows by heart is looked for."})
        hand_over(job, run, rows, clock.seconds)
        shutil.rmtree(base, ignore_errors=True)
    return outcome


class Clock:
    """Seconds of work on a job, those before a pause included; what was done after the last save is lost when killed,
    as are the steps."""

    def __init__(self, path: Path):
        self._path, self._started_s, self._earlier_s = path, time.monotonic(), 0.0
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self._earlier_s = float(json.loads(path.read_text())["seconds"])

    @property
    def seconds(self) -> float:
        return self._earlier_s + time.monotonic() - self._started_s

    def save(self) -> None:
        write_atomically(self._path, json.dumps({"seconds": self.seconds}))


def tell_all(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], seeds: Sequence[int], own_words: bool = False
) -> list[str]:
    """A story of each prompt with its seed, told as readers get them on a CPU.

    Args:
        own_words: without the prompts that were continued, which those are that are no ideas or too long to be.
    """
    from model.engine.cpu_backend import CpuBackend
    from model.prompt import plain_text
    from model.storyteller import Storyteller

    # Rounded as in the file that readers' stories will be told from.
    weights = {name: weight.detach().half().float().cpu().numpy() for name, weight in decoder.state_dict().items()}
    if decoder.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    n_slots = min(16, len(prompts))
    backend = CpuBackend(decoder.config, weights, n_slots, tokenizer.vocab_size)
    texts = []
    with Storyteller("in training", decoder.config, tokenizer, backend, n_slots, "cpu") as storyteller:
        longest = decoder.config.max_position_embeddings // 4  # that an idea may be

        def mode_of(prompt: str) -> Literal["idea", "opening"]:
            is_idea = storyteller.knows_ideas and storyteller.count_tokens(plain_text(prompt)) <= longest
            return "idea" if is_idea else "opening"

        for first in range(0, len(prompts), n_slots):
            told = [
                storyteller.tell(prompt, SamplingParams(max_tokens=SAMPLE_TOKENS, seed=seed), mode_of(prompt))
                for prompt, seed in zip(prompts[first : first + n_slots], seeds[first : first + n_slots], strict=True)
            ]
            for story in told:
                story.wait()
                if story.error:
                    raise TaleloomError(f"The storyteller in training could not be tried out: {story.error}")
                texts.append((story.continuation if own_words else story.text).strip())
    return texts


# The end of a job.


def hand_over(job: Job, run: FineTune, rows: Sequence[Row], seconds: float) -> None:
    """Make the best of the run one of the user's own storytellers, and write result.json."""
    from model.checkpoint import load_decoder

    evaluations = [record for record in read_lines(job.folder / "metrics.jsonl") if record.get("evaluation")]
    before, best = evaluations[0], next(e for e in evaluations if e["step"] == run.best_step)
    decoder = load_decoder(job.folder / "best")
    result: dict[str, Any] = {
        "name": job.name,
        "steps": run.step,
        "best_step": run.best_step,
        **{
            f"{kind}_bits_per_byte": {"before": before[f"{kind}_bits_per_byte"], "after": best[f"{kind}_bits_per_byte"]}
            for kind in ("own", "own_train", "original")
            if f"{kind}_bits_per_byte" in before
        },
        "memorised": memorised(decoder, run.tokenizer, [row for row in rows if row["split"] == "train"]),
        "stopped_because": run.stopped_because,
        "seconds": round(seconds, 1),
    }
    told = [s["stories"] for s in read_lines(job.folder / "samples.jsonl") if s["step"] == run.best_step]
    if made := next((own for own in own_models() if own.job == job.id), None):  # before it was killed
        write_atomically(job.folder / "result.json", json.dumps({**result, "name": made.name}, indent=2))
        return
    name = free_name(job.name)
    job = dataclasses.replace(job, name=name, note=read_request(job.folder).note)  # as it is now
    card = model_card(job, result, evaluations, told[-1] if told else [], rows)
    notes = {"job": job.id, "base": job.base, "created": time.time(), "note": job.note, "visitor": job.visitor}
    model: OwnModel = add_model(name, job.folder / "best", notes, card)
    result["name"] = model.name
    write_atomically(job.folder / "result.json", json.dumps(result, indent=2))


def free_name(name: str) -> str:
    """The name, with a number behind it where a storyteller has taken it meanwhile."""
    taken, number = models_folder(), 2
    candidate = name
    while (taken / candidate).exists():
        end = f"-{number}"
        candidate, number = name[: MAX_NAME - len(end)] + end, number + 1
    return candidate


def memorised(decoder: Decoder, tokenizer: Tokenizer, rows: Sequence[Row]) -> dict[str, Any]:
    """How much of 50 stories stands word for word in the training text; see evaluation.overlap.copied.

    The stories are told from the training's own ideas, where it has any: where learning by heart shows most.
    """
    from model.evaluation.overlap import copied

    own = [str(row["prompt"]) for row in rows if row["prompt"]] or [" ".join(row["text"].split()[:6]) for row in rows]
    prompts = [own[i % len(own)] for i in range(N_MEMORY_SAMPLES)]
    texts = tell_all(decoder, tokenizer, prompts, range(1, N_MEMORY_SAMPLES + 1), own_words=True)
    texts = [text for text in texts if words(text)]
    if not texts:
        raise InputError("The storyteller only tells empty stories now. Train less, or with a lower learning rate.")
    found = copied(texts, (row["text"] for row in rows))
    return {
        "stories": len(texts),
        "longest_run_words": found["longest_run_most"],
        "median_run_words": found["longest_run_median"],
        "copied_8grams": found["copied_8grams"],
    }


def model_card(
    job: Job,
    result: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
) -> str:
    """The card of a fine-tuned storyteller: where it comes from, how it learned, what it tells."""
    settings, memory = job.settings, result["memorised"]
    terms = _terms(job.base)
    base = Path(job.base).name if job.base and Path(job.base).is_dir() else job.base  # no path of this computer
    train = [row for row in rows if row["split"] == "train"]
    kinds = [kind for kind in ("own", "own_train", "original") if f"{kind}_bits_per_byte" in evaluations[0]]
    heads = {"own": "held-out own stories", "own_train": "own stories it read", "original": "original stories"}
    curve = "\n".join(
        f"| {e['step']} | " + " | ".join(f"{e[f'{kind}_bits_per_byte']:.3f}" for kind in kinds) + " |"
        for e in evaluations
    )
    defaults = FineTuneSettings()
    told = "\n\n".join(
        f"*{_escaped(sample['idea'])}*\n\n> " + _escaped(sample["text"]).replace("\n", "\n>\n> ") for sample in samples
    )
    changed = ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(settings).items() if value != getattr(defaults, name)
    )
    return f"""---
base_model: {json.dumps(base or BUNDLED_NAME)}
{BUNDLED_LICENCE if terms else ""}language: en
library_name: transformers
pipeline_tag: text-generation
tags: [taleloom, fine-tuned]
---

# {job.name}

A storyteller fine-tuned with Taleloom from {_escaped(base or BUNDLED_NAME)}{
        f": {_escaped(job.note)}" if job.note else "."
    }

| | |
| --- | --- |
| stories | {len(train)} to learn from, {len(rows) - len(train)} held out; {_escaped(job.source) or "own"} |
| method | {"LoRA, rank " + str(settings.lora_rank) if settings.method == "lora" else "all weights"} |
| steps | {result["steps"]}, the best after {result["best_step"]}; {result["seconds"] / 60:.1f} minutes |
| why it ended | {result["stopped_because"]} |
| settings other than the defaults | {changed or "none"} |

Bits per byte, lower is better; the last column tells what was forgotten:

| step | {" | ".join(heads[kind] for kind in kinds)} |
| ---: | {" | ".join("---:" for _ in kinds)} |
{curve}

Of {memory["stories"]} stories told from the training's own ideas the longest stretch that stands word for word in the
training text is {memory["longest_run_words"]} words (median {memory["median_run_words"]:.0f}).

## Stories

Told at the default settings, seed 1, not selected.

{told}
{terms}"""


def _terms(base: str | None) -> str:
    """What a child of `base` must say of its licence: what its parent says, whichever storyteller was bundled then."""
    if base is None:
        return BUNDLED_TERMS
    card = next((own.card for own in own_models() if own.name == base), "")
    start = card.rfind(TERMS_BEGIN)
    return card[start:] if start >= 0 else ""


def _escaped(text: str) -> str:
    """Text of others as Markdown that shows it as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~$" else c for c in text)
