"""Which of several drafts keeps best to what was asked: plain text in, a number out. Knows nothing of models.

A small storyteller loses its thread often, but not always, and it writes a story in a tenth of a second: writing
several and showing the best is the cheapest way to a better one (best-of-n sampling; Stiennon et al. 2020, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from model.text import sentences, words

N_DRAFTS = 12
FEW_WORDS = 60  # a shorter text is hardly a story
# Words that say what kind of text is wanted or hold a phrase together, not what the story is about.
GLUE = frozenset(
    """
    a about after again all also always am an and any are as at away back be because bedtime been before being big
    but by called can cannot child children come comes could daughter day did do does doing down each every find
    finds for from funny get gets give gives go goes going had happens has have having he help her here him his how
    i if in instead into is it its just kid kids know learn learns let like likes little look looks lot love loves
    made make makes many may me meet meets more most much must my named need needs never new night no not now of off
    old on once one only or other our out over own please put read really said says see sees she short should small
    so some somebody someone something son stop stories story take takes tale tales tell that the their them then
    there these they thing things this those three time to together too tries try turn turns two under up upon us
    use uses very want wanted wants was way we were what when where which who whose why will wish wishes with
    without word words would write year yet you your
    """.split()
)


def subject_words(prompt: str, limit: int = 6) -> list[str]:
    """The words of an idea or an opening that its story should come back to, in order."""
    found = [word for word in words(prompt) if word not in GLUE and len(word) > 2 and not word.isdigit()]
    return list(dict.fromkeys(found))[:limit]


def _forms(word: str) -> re.Pattern[str]:
    """A word with its common endings: fox, foxes; story, stories; sneeze, sneezed, sneezing."""
    stem = re.sub(r"(?<=[^\W\d_]{3})(?:ies|ing|ed|es|s|y|e)$", "", word)
    return re.compile(rf"\b{re.escape(stem)}(?:{stem[-1]}?(?:ies|ied|ing|ed|es|s|y|e|er))?\b", re.IGNORECASE)


def _kept(parts: Sequence[str], word: str) -> float:
    """From 0 to 1: is the word there, more than once, and in the last third of the sentences?"""
    pattern = _forms(word)
    places = [i for i, part in enumerate(parts) if pattern.search(part)]
    if not places:
        return 0.0
    return 0.2 + 0.3 * (len(places) >= 2) + 0.5 * (3 * places[-1] >= 2 * len(parts))


def _circling(text: str) -> float:
    """Share of the text's three words in a row that it has said before; about 0.03 in real stories."""
    said = words(text)
    triples = list(zip(said, said[1:], said[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def score(prompt: str, text: str, ended: bool) -> float:
    """How good a draft looks; higher is better, at most 1.

    Counts how well the subject of the prompt is kept to the end, and takes off for what reads badly: going in circles,
    sentences said twice, a text cut off at its limit (`ended` False), and next to no text.
    """
    parts = sentences(text)
    if not parts:
        return -2.0
    subjects = subject_words(prompt)
    kept = sum(_kept(parts, word) for word in subjects) / len(subjects) if subjects else 1.0
    plain = [" ".join(words(part)) for part in parts]
    repeated = 1 - len(set(plain)) / len(plain)
    return kept - 3 * _circling(text) - 2 * repeated - 0.5 * (not ended) - 0.5 * (len(words(text)) < FEW_WORDS)
