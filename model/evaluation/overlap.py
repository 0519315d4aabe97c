"""Overlap between texts: copied from the training text, like each other (self-BLEU), like the real continuation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from statistics import median

from model.evaluation.stories import share
from model.text import words

RUN_N, COPIED_N = 8, 13
N_SELF_BLEU = 100  # stories; the score rises with the number of references, so it is always the same


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def copied(texts: Sequence[str], corpus: Iterable[str]) -> dict[str, float]:
    """How much of the texts stands word for word in the corpus, which is read once and not kept.

    Returns:
        longest_run_median, longest_run_most: a story's longest stretch, in words, all of whose 8-grams are found
            (0 when none is; neighbouring 8-grams may come from different places, so it is an upper bound).
        copied_8grams, copied_13grams: share of all n-grams found; 13 words is the length by which Brown et al. (2020,
            arXiv:2005.14165, appendix C) call a text contaminated.
    """
    per_text = {n: [_ngrams(words(text), n) for text in texts] for n in (RUN_N, COPIED_N)}
    sought = {n: {ngram for ngrams in of_texts for ngram in ngrams} for n, of_texts in per_text.items()}
    found: dict[int, set[tuple[str, ...]]] = {RUN_N: set(), COPIED_N: set()}
    for text in corpus:
        tokens = words(text)
        for n in sought:
            found[n] |= sought[n].intersection(_ngrams(tokens, n))
    runs = []
    for ngrams in per_text[RUN_N]:
        longest = run = 0
        for ngram in ngrams:
            run = run + 1 if ngram in found[RUN_N] else 0
            longest = max(longest, run)
        runs.append(longest + RUN_N - 1 if longest else 0)
    shares = {
        f"copied_{n}grams": share(
            sum(ngram in found[n] for ngrams in of_texts for ngram in ngrams), sum(map(len, of_texts))
        )
        for n, of_texts in per_text.items()
    }
    return {"longest_run_median": median(runs), "longest_run_most": max(runs), **shares}


def self_bleu(texts: Sequence[str], seed: int = 1) -> float:
    """Mean BLEU-4 of each story against the others, 0 to 100; high when all are alike (Zhu et al. 2018, Texygen).

    Of a sample of N_SELF_BLEU stories.
    """
    from sacrebleu.metrics import BLEU

    sample = random.Random(seed).sample(list(texts), min(N_SELF_BLEU, len(texts)))
    if len(sample) < 2:
        return 0.0
    bleu = BLEU(lowercase=True, effective_order=True)
    scores = [bleu.sentence_score(text, sample[:i] + sample[i + 1 :]).score for i, text in enumerate(sample)]
    return share(sum(scores), len(scores))


def continuation_overlap(written: Sequence[str], real: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF (sacrebleu's defaults, 0 to 100) of continuations against the real ones, opening by opening.

    An opening can go on in many ways, so both are low for everyone. `chance` scores the same texts against other
    stories' continuations, each moved on by one.
    """
    from sacrebleu.metrics import BLEU, CHRF

    others = [*real[1:], *real[:1]]
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(written, [real]).score,
        "bleu_chance": bleu.corpus_score(written, [others]).score,
        "chrf": chrf.corpus_score(written, [real]).score,
        "chrf_chance": chrf.corpus_score(written, [others]).score,
    }
