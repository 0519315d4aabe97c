"""Ideas for stories that came without one: what a reader might have typed to get this story.

A storyteller learns "idea -> story" from pairs. Some corpora bring the prompt; for the others an idea is made from
the story itself: its hero, its recurring words, a sentence of its beginning.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping

# Words too common in children's stories to be what a story is about.
COMMON_WORDS = frozenset(
    """
    about across after again all along also always and angry another any are asked away back bad because been
    before began behind being below beside best better big both boy brave bring brother but came can can't
    cannot child children come could dad daddy day days did didn does doing don done door down each end even
    ever every everyone everything everywhere excited eye face feel felt finally find first for found friend
    friends from fun gave get girl give going gone good got great guy had hand hands happy hard has have head
    heard hello help helped her here herself him himself his home hope house how hungry idea inside into its
    just keep kept kind knew know last laughed learned leave left let like liked little live lived long look
    looked looking lot lots loud love loved loves mad made make man many may maybe met mom mommy moral more
    morning most mother much mum mummy must named near need never new next nice nodded not now off old once one
    only open other our out outside over own people place play played playing please pretty proud put ran
    realized really red replied right run sad said same sat saved saw say says scared see seen set share sharing
    she should shouted show sister sit small smile smiled some someone something soon special started stay still
    stop stopped story stuck such suddenly sure surprise take takes talk tell thank that the their them then
    there these they thing things think this those thought through time today together told too took tried try
    turned two under until use very wait walked want wanted was watched way well went were what when where which
    while white who why will wise wish with work would yes yet you your
    """.split()
)
HERO = re.compile(
    r"\b(?:there (?:was|lived|were)|lived|was|knew|saw|met|is) "
    r"((?:an? |two |three |some )[a-z][a-z' -]{2,40}?(?: (?:named|called) [A-Z][a-z]+)?)"
    r"(?= who\b| that\b| and\b| in\b|[.,;!])"
)
LLAMA_TITLE = re.compile(r"called `([^`]+)`")
FABLE_FIELD = re.compile(r"^- (Main Character|Setting|Challenge|Outcome|Teaching): (.+)$", re.MULTILINE)
ABOUT = re.compile(r"^(?:write|tell)(?: me)? a (?:\w+ )?story about ", re.IGNORECASE)


def key_words(text: str, n: int) -> list[str]:
    """Up to n lower-case words that recur in the text and carry its subject; most frequent first.

    Where some of them stand in the last third too, only these: an idea is to be kept to the end.
    """
    words = re.findall(r"(?<![A-Za-z'])[a-z]{3,}(?!')", text)
    counts = Counter(word for word in words if word not in COMMON_WORDS)
    recurring = [word for word, count in counts.most_common() if count > 1]
    late = set(words[2 * len(words) // 3 :])
    return ([word for word in recurring if word in late] or recurring)[:n]


def hero(text: str) -> str | None:
    """The first person or animal a story introduces, as "a little girl named Lily"."""
    match = HERO.search(text[:300])
    return match.group(1) if match else None


def opening_sentence(text: str, rng: random.Random) -> str | None:
    """One of the first two sentences, in the form of an idea, when it is short enough to be one."""
    sentences = re.findall(r"[^.!?\n\"]+(?=[.!?])", text[:400])[:2]
    sentences = [re.sub(r"^(?:Once upon a time|One day|Once|There once),? ", "", s.strip()) for s in sentences]
    sentences = [re.sub(r"^there (?:was|lived) ", "", s) for s in sentences if 3 <= len(s.split()) <= 16]
    return rng.choice(sentences) if sentences else None


def _from_story(text: str, rng: random.Random) -> str | None:
    words = key_words(text, 6)
    character = hero(text)
    forms: list[str | None] = [opening_sentence(text, rng), character]
    if len(words) >= 2:
        chosen = rng.sample(words, min(len(words), rng.choice((1, 2, 3))))
        forms += [", ".join(chosen), "Use the words: " + ", ".join(chosen)]
        if character:
            forms += [f"{character} and {chosen[0]}", f"a story about {character}, with {' and '.join(chosen[:2])}"]
    forms = [form for form in forms if form]
    return rng.choice(forms) if forms else None


def _from_fable(fields: Mapping[str, str], rng: random.Random) -> str:
    who = re.sub(r"^an? (?=[aeiou])", "an ", fields["Main Character"])
    where = re.sub(r"^an? ", "", fields.get("Setting", "").removesuffix(" where our story unfolds"))
    where = f"the {where}"
    forms = [who, f"{who} and {fields.get('Challenge', 'a friend')}"]
    if "Setting" in fields:
        forms.append(f"{who} in {where}")
    if "Teaching" in fields:
        forms.append(f"{who} who learns that {fields['Teaching']}")
    return rng.choice(forms)


def idea_for(row: Mapping[str, object], text: str, rng: random.Random) -> str | None:
    """What a reader might have asked to get this story; None when nothing fits.

    `row` is the data set's row (its `prompt`, `title` and `words` are used where they are), `text` the cleaned story.
    """
    prompt = str(row.get("prompt") or "")
    if "kind" in row:  # written with readers' prompts
        words = row.get("words")
        if row["kind"] == "opening" or (isinstance(words, list) and rng.random() < 0.1):
            return ", ".join(map(str, words)) if isinstance(words, list) and words else None
        return prompt or None
    if title := LLAMA_TITLE.search(prompt):
        return title.group(1)
    if fields := dict(FABLE_FIELD.findall(prompt)):
        return _from_fable(fields, rng) if "Main Character" in fields else None
    if prompt and len(prompt) < 200:
        return ABOUT.sub("", prompt).rstrip(".")
    if (title_field := row.get("title")) and rng.random() < 0.5:
        return str(title_field)
    return _from_story(text, rng)
