"""What a reader typed: as the training text is written, and whether it is an idea or an opening."""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["idea", "opening"]
TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "})
REQUEST_START = re.compile(
    r"(?:please |can you |could you )?(?:tell|write|make|give|use)\b|(?:a|the) (?:story|tale)\b|words?:", re.IGNORECASE
)
TALE_START = re.compile(
    r"(?:Once|One|There (?:was|were|lived)|Long ago|In (?:a|the)|It was|On a|At the|Deep in|Far away)\b"
)


def plain_text(text: str) -> str:
    """A prompt as the training text is written: plain quotes and dashes, one newline between paragraphs."""
    lines = (line.strip() for line in text.translate(TYPOGRAPHY).split("\n"))
    return "\n".join(line for line in lines if line)


def guess_mode(prompt: str) -> Mode:
    """Whether a prompt reads like the opening of a story or like an idea for one.

    An opening is written as prose: it starts like a tale or has the marks of a sentence. "a dragon who is afraid of
    fire" and "Tell me a story about a pirate." are ideas.
    """
    text = prompt.strip()
    if REQUEST_START.match(text):
        return "idea"
    goes_on = re.search(r"[.!?][\"”']?\s+\S", text)  # past the end of a first sentence
    is_prose = text[:1].isupper() and (goes_on or (len(text.split()) >= 5 and text[-1] in '.,!?"”'))
    is_opening = TALE_START.match(text) or text[:1] in '"“' or is_prose or len(text) > 200
    return "opening" if is_opening else "idea"
