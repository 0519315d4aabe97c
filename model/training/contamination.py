"""How much of a validation text a training corpus holds: what a score on it is worth."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

NEAR_N, NEAR_SHARE = 8, 0.5  # a near duplicate has half of its 8-grams in one training story
LONG_N = 13  # of these, real stories share some by nature


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def contamination(training: Iterable[str], validation: Sequence[str]) -> dict[str, Any]:
    """Compare texts by their lower-cased words.

    Returns:
        exact: validation stories that training holds word for word; near: those of which a training story holds at
        least half of the 8-grams; share_13: the share of validation's distinct 13-grams that occur in training.
    """
    stories = [_words(text) for text in validation]
    whole = {tuple(words) for words in stories}
    near_index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for i, words in enumerate(stories):
        grams = set(_grams(words, NEAR_N))
        sizes.append(len(grams))
        for gram in grams:
            near_index[gram].append(i)
    long = {gram for words in stories for gram in _grams(words, LONG_N)}
    exact: set[tuple[str, ...]] = set()
    near: set[int] = set()
    seen: set[tuple[str, ...]] = set()
    for text in training:
        words = _words(text)
        if tuple(words) in whole:
            exact.add(tuple(words))
        shared = Counter(i for gram in set(_grams(words, NEAR_N)) for i in near_index.get(gram, ()))
        near |= {i for i, count in shared.items() if count >= NEAR_SHARE * sizes[i]}
        seen |= long.intersection(_grams(words, LONG_N))
    return {
        "exact": sum(tuple(words) in exact for words in stories),
        "near": len(near),
        "share_13": len(seen) / len(long) if long else 0.0,
        "stories": len(stories),
    }
