"""All measures of a storyteller's stories in one dict, from plain text: what `taleloom evaluate --stories` reports."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import InputError
from model.evaluation.following import Idea, following
from model.evaluation.overlap import continuation_overlap, copied, self_bleu
from model.evaluation.realism import detection, shuffled
from model.evaluation.stories import ToldStory, measure_texts, share
from model.text import SENTENCE_END, sentences
from model.tokenizer import Tokenizer

OPENING_SENTENCES = 2
MIN_SENTENCES = 2 * OPENING_SENTENCES + 1  # of a real story that is to have an opening and more
MIN_REAL = 20


@dataclass(frozen=True)
class Split:
    """A real story cut after its second sentence."""

    opening: str
    rest: str


def require_extra() -> None:
    """Raises InputError, saying what to install, when a package of the extra is missing."""
    missing = [name for name in ("sacrebleu", "sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"Measuring stories needs {', '.join(missing)}: pip install 'taleloom[evaluate]'.")


def split_openings(
    texts: Sequence[str], n: int, tokenizer: Tokenizer, max_tokens: int, seed: int = 1
) -> tuple[list[Split], list[Split]]:
    """Two disjoint samples of real stories of up to n each: one gives openings to continue, one is compared with.

    The real continuations are cut at `max_tokens` as the generated ones are: length alone must not give those away.

    Raises:
        InputError: there are too few stories to split anything.
    """
    long = [text for text in texts if len(sentences(text)) >= MIN_SENTENCES]
    if len(long) < MIN_REAL:
        raise InputError(f"The real stories are too few: {MIN_REAL} of {MIN_SENTENCES} sentences or more are needed.")
    chosen = random.Random(seed).sample(long, min(2 * n, len(long) // 2 * 2))
    splits = []
    for text in chosen:
        ends = [match.start() for match in SENTENCE_END.finditer(text)]
        cut = ends[OPENING_SENTENCES - 1]
        rest = tokenizer.decode(tokenizer.encode(text[cut:].strip())[:max_tokens])
        splits.append(Split(text[:cut].strip(), rest.strip()))
    return splits[: len(splits) // 2], splits[len(splits) // 2 :]


def measure_told(told: Sequence[ToldStory]) -> dict[str, Any]:
    """The measures of text, and how many stories ended by themselves."""
    texts = [story.text for story in told]
    return {
        "ended": share(sum(story.ended for story in told), len(told)),
        **measure_texts(texts),
        "self_bleu": self_bleu(texts),
    }


def measure_ideas(
    told: Sequence[ToldStory], ideas: Sequence[Idea], corpus: Callable[[], Iterable[str]] | None
) -> dict[str, Any]:
    """Stories told from ideas, one each; `corpus` gives the training text anew whenever it is called."""
    texts = [story.text for story in told]
    return {**measure_told(told), **following(ideas, texts), **(copied(texts, corpus()) if corpus else {})}


def measure_real(
    texts: Sequence[str], n: int, corpus: Callable[[], Iterable[str]] | None, seed: int = 1
) -> dict[str, Any]:
    """The same of n real stories, as far as it has a meaning for them."""
    sample = random.Random(seed).sample(list(texts), min(n, len(texts)))
    return {**measure_texts(sample), "self_bleu": self_bleu(sample), **(copied(sample, corpus()) if corpus else {})}


def measure_continuations(
    told: Sequence[ToldStory], hot: Sequence[ToldStory], openings: Sequence[Split], others: Sequence[Split]
) -> dict[str, Any]:
    """Continuations of real openings against the real ones, and realism against other real stories' continuations.

    Args:
        hot: continuations by a known bad model, the positive control.
        openings: what both continue.
        others: real stories that gave no opening.
    """
    own, real = [split.rest for split in openings], [split.rest for split in others]
    texts = [story.text for story in told]
    return {
        "continuations": {**measure_told(told), **continuation_overlap(texts, own)},
        "realism": {
            "generated": detection(real, texts),
            "control_real": detection(real, own),
            "control_shuffled": detection(real, shuffled(own)),
            "control_hot": detection(real, [story.text for story in hot]),
        },
    }
