"""Does a story keep to its idea? Ideas annotated with their main character and their thing, sought in the story."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.evaluation.stories import share
from model.text import sentences

IDEAS = Path(__file__).parent / "data" / "ideas.jsonl"


@dataclass(frozen=True)
class Idea:
    """An idea as a reader types it, and the forms in which a story may name what it is about."""

    idea: str
    character: tuple[str, ...]
    thing: tuple[str, ...]


def read_ideas(path: Path = IDEAS) -> list[Idea]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Idea(row["idea"], tuple(row["character"]), tuple(row["thing"])) for row in rows]


def sentences_with(text: str, forms: Sequence[str]) -> tuple[list[int], int]:
    """The places, from 0, of the sentences with any of the forms as a whole word; and how many sentences there are."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, forms))})\b", re.IGNORECASE)
    parts = sentences(text)
    return [i for i, sentence in enumerate(parts) if pattern.search(sentence)], len(parts)


def is_kept(text: str, forms: Sequence[str]) -> bool:
    """Whether two sentences or more name it, one of them in the last third of the sentences."""
    places, n = sentences_with(text, forms)
    return len(places) >= 2 and 3 * places[-1] >= 2 * n


def following(ideas: Sequence[Idea], texts: Sequence[str]) -> dict[str, float]:
    """Of stories told from ideas, one each: shares in which character, thing, or both are kept (see is_kept).

    words_used is the share of all characters and things that their story names at all.
    """
    pairs = list(zip(ideas, texts, strict=True))
    character = [is_kept(text, idea.character) for idea, text in pairs]
    thing = [is_kept(text, idea.thing) for idea, text in pairs]
    used = [bool(sentences_with(text, forms)[0]) for idea, text in pairs for forms in (idea.character, idea.thing)]
    return {
        "character_kept": share(sum(character), len(pairs)),
        "thing_kept": share(sum(thing), len(pairs)),
        "both_kept": share(sum(a and b for a, b in zip(character, thing, strict=True)), len(pairs)),
        "words_used": share(sum(used), len(used)),
    }
