"""Measures of stories as text: length, variety, repetition, names, reading level. Knows nothing of the model.

Each is a heuristic that means little alone: measure real stories by it as well and compare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from model.text import names, sentences, words

DISTINCT_NGRAMS = 10_000  # the ratio falls with the amount of text, so it is taken of the same amount
MIN_REPEATED_WORDS = 4  # '"Oh!" said Ben' may come twice


@dataclass(frozen=True)
class ToldStory:
    """A story that was generated, and how."""

    prompt: str
    mode: str  # "idea" or "opening"
    seed: int
    text: str  # without the opening
    tokens: int
    ended: bool  # by its end token, not by the limit


def share(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return part / whole if whole else 0.0


def distinct_n(texts: Sequence[str], n: int, most: int = DISTINCT_NGRAMS) -> float:
    """Different n-grams of words over all, in the first `most` (Li et al. 2016, arXiv:1510.03055, section 5)."""
    ngrams: list[tuple[str, ...]] = []
    for text in texts:
        tokens = words(text)
        ngrams += zip(*(tokens[i:] for i in range(n)), strict=False)
        if len(ngrams) >= most:
            break
    return share(len(set(ngrams[:most])), len(ngrams[:most]))


def repeated_sentences(text: str) -> int:
    """How many sentences of four words or more stood in the same story before, case and punctuation aside."""
    plain = [tuple(words(sentence)) for sentence in sentences(text)]
    long = [sentence for sentence in plain if len(sentence) >= MIN_REPEATED_WORDS]
    return len(long) - len(set(long))


def name_consistency(texts: Sequence[str]) -> dict[str, float]:
    """What becomes of the names of the stories' people.

    Returns:
        names_per_story: different names.
        names_lost: of the names first met in a story's first half, the share that its second half never mentions.
        names_late: of all names, the share first met in the last quarter.
        name_given_twice: share of stories that say "named X" or "called X" twice of one X.
    """
    n_names = n_early = n_lost = n_late = n_twice = 0
    for text in texts:
        by_sentence = names(text)
        n = len(by_sentence)
        places: dict[str, list[int]] = {}
        for i, found in enumerate(by_sentence):
            for name in found:
                places.setdefault(name, []).append(i)
        early = [where for where in places.values() if 2 * where[0] < n]
        n_names += len(places)
        n_early += len(early)
        n_lost += sum(2 * where[-1] < n for where in early)
        n_late += sum(4 * where[0] >= 3 * n for where in places.values())
        given = re.findall(r"\b(?:named|called) ([A-Z][a-z]+)", text)
        n_twice += len(given) > len(set(given))
    return {
        "names_per_story": share(n_names, len(texts)),
        "names_lost": share(n_lost, n_early),
        "names_late": share(n_late, n_names),
        "name_given_twice": share(n_twice, len(texts)),
    }


def syllables(word: str) -> int:
    """Groups of vowels, a silent final e not counted; at least one."""
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = (word.endswith("e") and not word.endswith(("le", "ee"))) or re.search(r"[^td]ed$", word) is not None
    return max(1, groups - silent)


def reading_grade(texts: Sequence[str]) -> float:
    """Flesch-Kincaid grade: the school year (US) that can read all this text (Kincaid et al. 1975)."""
    tokens = [word for text in texts for word in words(text)]
    n_sentences = sum(len(sentences(text)) for text in texts)
    n_syllables = sum(map(syllables, tokens))
    return 0.39 * share(len(tokens), n_sentences) + 11.8 * share(n_syllables, len(tokens)) - 15.59


def measure_texts(texts: Sequence[str]) -> dict[str, Any]:
    """All measures of this module, of generated or of real stories."""
    return {
        "stories": len(texts),
        "median_words": median(len(words(text)) for text in texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "repeated_sentences": share(sum(map(repeated_sentences, texts)), sum(len(sentences(text)) for text in texts)),
        **name_consistency(texts),
        "reading_grade": reading_grade(texts),
    }
