"""Realism: can a small classifier tell generated stories from real ones by their form?

The features are about form (lengths, punctuation, function words, repetition, cohesion), not about what a story tells:
a bag of words would only find that the two sets have different heroes. An accuracy of 0.5 means it cannot tell.
A measure that catches nothing proves nothing, so it is run on known bad stories too (see shuffled).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from model.evaluation.stories import reading_grade, repeated_sentences, share
from model.text import names, sentences, words

N_SPLITS = 20
VALIDATION_SHARE = 0.2
VARIETY_WORDS = 100  # variety falls with length, so it is taken of a story's first words
FUNCTION_WORDS = """a an and as at but by for from had he her him his i in is it not of on or said she so that the their
    them then there they to very was we were when who with would you""".split()
PUNCTUATION = {"comma": ",", "stop": ".", "exclamation": "!", "question": "?", "quote": '"', "apostrophe": "'"}


def features(text: str) -> dict[str, float]:
    """Numbers about a story's form; rates are per word unless the name says otherwise."""
    tokens, parts = words(text), sentences(text)
    lengths = [len(words(part)) for part in parts] or [0]
    first = tokens[:VARIETY_WORDS]
    named = [name for found in names(text) for name in found]
    content = [set(words(part)) - set(FUNCTION_WORDS) for part in parts]
    earlier = [set().union(*content[:i]) for i in range(len(content))]
    before = list(zip(content, earlier, strict=True))[1:]
    follows = list(pairwise(content))
    starts = [words(part)[0] for part in parts]
    n = len(tokens)
    return {
        "words": n,
        "sentences": len(parts),
        "paragraphs": len(re.findall(r"[^\n]+", text)),
        "word_length": share(sum(map(len, tokens)), n),
        "sentence_mean": fmean(lengths),
        "sentence_deviation": pstdev(lengths),
        "sentence_longest": max(lengths),
        "sentence_first": lengths[0],
        "sentence_last": lengths[-1],
        "distinct_1": share(len(set(first)), len(first)),
        "distinct_2": share(len(set(pairwise(first))), len(first)),
        "distinct_3": share(len(set(zip(first, first[1:], first[2:], strict=False))), len(first)),
        "once_only": share(sum(first.count(word) == 1 for word in set(first)), len(first)),
        "speech": share(sum(len(words(said)) for said in re.findall(r'"([^"]*)"', text)), n),
        "odd_quotes": text.count('"') % 2,
        "ends_well": bool(re.search(r"[.!?]['\"]?\s*$", text)),
        "names": len(set(named)),
        "names_per_word": share(len(named), n),
        "repeated_sentences": share(repeated_sentences(text), len(parts)),
        "same_start": share(sum(a == b for a, b in pairwise(starts)), len(parts)),
        # Cohesion: of a sentence's content words, how many were there before.
        "known_words": fmean([share(len(now & old), len(now)) for now, old in before] or [0]),
        "from_last_sentence": fmean([share(len(now & last), len(now)) for last, now in follows] or [0]),
        "all_new": share(sum(not now & old for now, old in before), len(parts)),
        "grade": reading_grade([text]),
        **{name: share(text.count(mark), n) for name, mark in PUNCTUATION.items()},
        **{f"word_{word}": share(tokens.count(word), n) for word in FUNCTION_WORDS},
    }


def detection(real: Sequence[str], generated: Sequence[str], n_splits: int = N_SPLITS, seed: int = 1) -> dict[str, Any]:
    """Accuracy of an MLPClassifier on the fifth of the stories that it was not trained on, over repeated splits.

    Both sides are cut to the shorter one's number of stories, so that chance is 0.5.

    Returns:
        accuracy (mean over the splits), deviation (between them), stories (of each kind), splits.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(len(real), len(generated))
    x_nf = np.array([list(features(text).values()) for text in [*real[:n], *generated[:n]]], np.float64)
    is_real_n = np.arange(2 * n) < n
    accuracies = []
    for split in range(n_splits):
        x_train, x_valid, y_train, y_valid = train_test_split(
            x_nf, is_real_n, test_size=VALIDATION_SHARE, stratify=is_real_n, random_state=seed + split
        )
        # Strong weight decay: there are hundreds of stories, not thousands.
        network = MLPClassifier((32,), alpha=3.0, tol=1e-3, max_iter=1000, random_state=seed)
        classifier = make_pipeline(StandardScaler(), network).fit(x_train, y_train)
        accuracies.append(float(classifier.score(x_valid, y_valid)))
    return {"accuracy": fmean(accuracies), "deviation": pstdev(accuracies), "stories": n, "splits": n_splits}


def shuffled(texts: Sequence[str], seed: int = 1) -> list[str]:
    """The same sentences dealt anew into the same paragraphs: each sentence is real, no story is."""
    paragraphs = [[len(sentences(line)) for line in text.split("\n")] for text in texts]
    pool = [sentence for text in texts for sentence in sentences(text)]
    random.Random(seed).shuffle(pool)
    deck = iter(pool)
    return ["\n".join(" ".join(next(deck) for _ in range(n)) for n in lines) for lines in paragraphs]
