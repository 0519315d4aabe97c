"""What a careful reader would object to in a story world's stories, found without reading them all."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher

from model.errors import InputError
from model.worlds.world import World

N_STORIES = 300
LEAST_DISTINCT = 290  # of these
MOST_ALIKE = 0.75  # mean likeness of two stories, by their words
DOUBLED = re.compile(
    r"\b(?!(?:very|so|had|that|no|ha|really|long|far|on|up|round|tap|knock|yes)\b)(\w+) \1\b", re.IGNORECASE
)
SMALL_START = re.compile(r"(?:^|[.!?] )[\"']?[a-z]")
BAD_ARTICLE = re.compile(r"\b(?:a [aeio]\w+|an (?![aeiouh])\w+)", re.IGNORECASE)
BAD_SPACE = re.compile(r"\\| [,.!?;:]|\.\.(?!\.)|,,|[.!?][A-Za-z]")


def check(world: World) -> list[str]:
    """Complaints about a world, each a sentence; none means that nothing was found, not that it is good."""
    complaints: list[str] = []
    texts: list[str] = []
    try:
        texts = [world.tell(seed)["text"] for seed in range(N_STORIES)]
    except InputError as error:
        return [str(error)]
    for beat in world.beats:
        for telling in beat.tellings:
            literal = max(re.split(r"\{[^}]*\}|\[[^\]]*\]|[Aa]\(n\)|\n|\s{2,}", telling.text), key=len).strip()
            if len(literal) > 8 and not any(literal in text for text in texts):
                complaints.append(f"beat {beat.name}: never told: {telling.text[:70]!r}")
    for text in texts:
        for line in text.split("\n"):
            for what, pattern in (
                ("a doubled word", DOUBLED),
                ("a sentence begins small", SMALL_START),
                ("an article", BAD_ARTICLE),
                ("punctuation", BAD_SPACE),
            ):
                if match := pattern.search(line):
                    start = max(0, match.start() - 25)
                    complaints.append(f"{what}: ...{line[start : match.end() + 25]}...")
            if line.count('"') % 2:
                complaints.append(f"an open quotation: {line[:80]}...")
        if not 80 <= len(text.split()) <= 330:
            complaints.append(f"a story of {len(text.split())} words (80 to 330 are wanted)")
    if len(set(texts)) < LEAST_DISTINCT:
        complaints.append(f"{len(set(texts))} different stories among {N_STORIES}")
    pairs = zip(texts[:60:2], texts[1:60:2], strict=True)
    alike = sum(SequenceMatcher(None, a.split(), b.split()).ratio() for a, b in pairs) / 30
    if alike > MOST_ALIKE:
        complaints.append(
            f"two stories share {alike:.0%} of their words on average; more and freer tellings are wanted"
        )
    return [f"{text} ({n} times)" if n > 1 else text for text, n in Counter(complaints).most_common()]
