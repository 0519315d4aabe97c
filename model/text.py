"""Words, sentences and names of a story, found by simple rules that the other measures share."""

from __future__ import annotations

import re

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# After an end mark, with or without a closing quote, where no lower-case letter goes on ('"Oh!" said Ben.' is one).
SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?:(?<=[.!?])|(?<=[.!?]['\"]))\s+(?=['\"]?[^\Wa-z_])|\n+")
CAPITALISED = re.compile(r"(?:(?<=[^\W\d_] )|(?<=[^\W\d_], ))[A-Z][a-z]+")
NOT_NAMES = frozenset(
    """Mom Mommy Mum Mummy Mama Mother Dad Daddy Papa Father Grandma Grandpa Granny Grandmother Grandfather Mr Mrs Miss
    Ms Dr God Christmas Easter Halloween Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March
    April May June July August September October November December English Ok Okay Yes No Hello Hi""".split()
)


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes within them kept."""
    return WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """The sentences that hold a word; a line's end ends one too."""
    return [part.strip() for part in SENTENCE_END.split(text) if WORD.search(part)]


def names(text: str) -> list[list[str]]:
    """The names in each sentence, in order.

    A name is a capitalised word that stands somewhere in the story after another word of its sentence (the first word
    of a sentence or of speech has its capital anyway), and is no day, month or form of address.
    """
    parts = sentences(text)
    known = {name for part in parts for name in CAPITALISED.findall(part)} - NOT_NAMES
    return [[word for word in re.findall(r"[A-Z][a-z]+", part) if word in known] for part in parts]
