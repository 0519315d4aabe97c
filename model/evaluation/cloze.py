"""Cloze: pairs of a right and a wrong end of a sentence, scored by likelihood. Knows nothing of torch.

The pairs come in twins (see data/cloze.toml): each word is right in one context and wrong in the other, so a model that
ignores the context scores one half however likely it holds the words to be.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.tokenizer import Tokenizer

PAIRS = Path(__file__).parent / "data" / "cloze.toml"
Logits = Callable[[list[int]], np.ndarray]  # logits [t, v] after each of t tokens


@dataclass(frozen=True)
class ClozePair:
    topic: str
    context: str
    right: str  # with the space before it and the full stop after it
    wrong: str


def read_pairs(path: Path = PAIRS) -> list[ClozePair]:
    """Two pairs of every row of the file."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [(topic, *row) for topic, table in tables.items() for row in table]
    return [
        ClozePair(topic, context, f" {right}.", f" {wrong}.")
        for topic, context_1, word_1, context_2, word_2 in rows
        for context, right, wrong in ((context_1, word_1, word_2), (context_2, word_2, word_1))
    ]


def log_likelihood(logits: Logits, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Sum of log p(token | all before it), in nats, over the continuation's tokens."""
    tokens = [*context, *continuation]
    logits_tv = np.asarray(logits(tokens[:-1]), np.float64)[len(context) - 1 :]
    logits_tv -= logits_tv.max(axis=1, keepdims=True)
    log_p_tv = logits_tv - np.log(np.exp(logits_tv).sum(axis=1, keepdims=True))
    return float(log_p_tv[np.arange(len(continuation)), list(continuation)].sum())


def cloze(pairs: Sequence[ClozePair], tokenizer: Tokenizer, logits: Logits) -> dict[str, Any]:
    """Share of pairs whose right end is likelier than the wrong one.

    Only pairs whose two ends have equally many tokens count: a sum over more tokens is lower for that alone.

    Returns:
        accuracy, standard_error, pairs (counted), pairs_left_out, topics (accuracy of each), missed (the pairs).
    """
    by_topic: dict[str, list[bool]] = {}
    missed = []
    for pair in pairs:
        right, wrong = tokenizer.encode(pair.right), tokenizer.encode(pair.wrong)
        if len(right) != len(wrong):
            continue
        context = tokenizer.encode_opening(pair.context)
        found = log_likelihood(logits, context, right) > log_likelihood(logits, context, wrong)
        by_topic.setdefault(pair.topic, []).append(found)
        if not found:
            missed.append(f"{pair.context}{pair.right} / {pair.wrong.strip()}")
    n_pairs = sum(map(len, by_topic.values()))
    accuracy = sum(map(sum, by_topic.values())) / n_pairs if n_pairs else math.nan
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n_pairs) if n_pairs else math.nan,
        "pairs": n_pairs,
        "pairs_left_out": len(pairs) - n_pairs,
        "topics": {topic: sum(found) / len(found) for topic, found in by_topic.items()},
        "missed": missed,
    }
