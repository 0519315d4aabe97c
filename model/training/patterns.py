"""Patterns that twins are drawn from: little situations with slots for who, what and where.

A storyteller that learns from stories guesses who of two has which thing: one layer must mark each thing with its owner
and a later one look the owner up, and neither pays before the other is there. Written twins are too few and too mixed
to bring that about, and whole situations are learnt by heart. So a program puts together any introduction of a state
("{B} lent {A} the {x} and was left with the {y}.") and any question for it ("At night {A} put away the"), the shortest
first (docs/training.md has figures).
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from model.errors import InputError
from model.training.twins import TwinText, is_held_out

# A state binds its first slot with its third, its second with its fourth ({A} has the {x}, {B} the {y}). The
# number says how often it is drawn.
STATES = {
    "has": ("ABxy", 34),
    "wants": ("ABxy", 14),
    "person in place": ("ABpq", 16),
    "thing in place": ("xypq", 16),
    "person is": ("ABuv", 10),
    "thing is": ("xycd", 10),
}
KINDS = (50, 25, 17, 8)  # how often a state, a situation, a relation and a pair are drawn, in the end
WORDS = ("girl", "boy", "other", "thing", "place", "person is", "thing is", "between", "opening")
OTHER_OF = dict(zip("ABxypquvcd", "BAyxqpvudc", strict=True))
SLOT = re.compile(r"\{(a?)(A|B|C|x|y|z|p|q|r|u|v|c|d|boy|girl)\}")  # {ax} has an article
SENTENCE_START = re.compile(r'(^|[.!?] |\." |^"|[.!?,] ")([a-z])')
FEWEST_WORDS = 6  # of a kind: three people may be called like three things or places
FEWEST = 8  # introductions, or questions, of a state to choose from, however easy
EASIEST = 0.08  # of them
LONGEST = 47  # words of two introductions and a question


def slots(text: str) -> set[str]:
    """The slots in a text: A, x and so on."""
    return {name for _, name in SLOT.findall(text)}


def exchanged(text: str, names: Iterable[str]) -> str:
    """The text with each slot of `names` in the place of the other one of its pair."""
    return SLOT.sub(lambda m: f"{{{m[1]}{OTHER_OF[m[2]] if m[2] in names else m[2]}}}", text)


def filled(text: str, words: dict[str, str]) -> str:
    """The text with words in its slots; sentences begin with a capital."""

    def word(match: re.Match[str]) -> str:
        article = ("an " if words[match[2]][0] in "aeiou" else "a ") if match[1] else ""
        return article + words[match[2]]

    return SENTENCE_START.sub(lambda m: m[1] + m[2].upper(), SLOT.sub(word, text))


class Patterns:
    """Patterns from a file, and twins drawn from them.

    A line has fields with tabs between: `words`, a kind, words with commas between (sentences, with bars between);
    a state of STATES or `relation N`, `introduction`, text; the same, `question`, text, slot that ends it; `situation`,
    text, slot that ends it; `pair`, text, its slot, another text, its slot.
    """

    def __init__(self, path: Path, held_out: bool = False):
        """Read those patterns that are held out, or those that are not.

        Raises:
            InputError: the file is missing, a line is none of the above, or there are too few of a kind.
        """
        self._words: dict[str, list[str]] = {}
        self._introductions: defaultdict[str, list[str]] = defaultdict(list)
        self._questions: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        self._situations: list[tuple[str, str]] = []
        self._pairs: list[TwinText] = []
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(f"The patterns in {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            fields = line.split("\t")
            is_state = fields[0] in STATES
            bound = set(STATES[fields[0]][0] if is_state else "AB" if fields[0].startswith("relation ") else "")
            # A relation is held out as a whole.
            wanted = is_held_out(fields[0] if fields[0].startswith("relation ") else line) == held_out
            match fields:
                case [""]:
                    pass
                case ["words", kind, words]:
                    self._words[kind] = words.split("|" if "|" in words else ", ")
                case [state, "introduction", text] if bound and bound <= slots(text):
                    if wanted:
                        self._introductions[state].append(text)
                case [state, "question", text, end] if end in bound - slots(text):
                    # One that told more of a state would contradict an introduction with its roles exchanged.
                    if is_state and (len(bound & slots(text)) != 1 or OTHER_OF[end] in slots(text)):
                        raise InputError(f"{path}, line {number}: ask with one slot, not of the ending's pair: {text}")
                    if wanted:
                        self._questions[state].append((text, end))
                case ["situation", text, ending] if ending in OTHER_OF and {ending, OTHER_OF[ending]} <= slots(text):
                    if wanted:
                        self._situations.append((text, ending))
                case ["pair", text, end, other, other_end] if end in slots(text) and other_end in slots(other):
                    if wanted:
                        self._pairs.append((text, end, other, other_end))
                case _:
                    raise InputError(f"{path}, line {number}: this is not a pattern: {line[:80]}")
        for texts in self._introductions.values():
            texts.sort(key=len)
        for questions in self._questions.values():
            questions.sort(key=lambda question: len(question[0]))
        self._relations = [name for name in self._introductions if name not in STATES and self._questions[name]]
        missing = [f"words, {kind}" for kind in WORDS if len(self._words.get(kind, [])) < FEWEST_WORDS]
        missing += [name for name in STATES if not self._introductions[name] or not self._questions[name]]
        lists = {"situation": self._situations, "pair": self._pairs, "relation": self._relations}
        if missing := missing + [name for name, found in lists.items() if not found]:
            raise InputError(f"{path} has too few lines of: {', '.join(missing)}.")

    def draw(self, rng: random.Random, hardness: float = 1.0) -> TwinText:
        """A twin. `hardness` of 0 to 1: of a state's shortest introductions and questions at first, then of longer ones
        and now and then of the other kinds; at 1 of all, as often as KINDS says."""
        if hardness < 1 and rng.random() >= 0.4 * hardness:
            return self._state(rng, max(EASIEST, hardness), alone=True)
        return rng.choices((self._state, self._situation, self._relation, self._pair), KINDS)[0](rng)

    def _state(self, rng: random.Random, share: float = 1.0, alone: bool = False) -> TwinText:
        state = rng.choices(list(STATES), [weight for _, weight in STATES.values()])[0]
        bound = STATES[state][0]
        introduction = self._introduction(rng, state, share)
        questions = self._questions[state]
        question, ending = rng.choice(questions[: max(FEWEST, int(share * len(questions)))])
        said = [introduction]
        if not alone and rng.random() < 0.3:
            said = self._distracted(rng, state, introduction, question)
        told = self._spaced(rng, said)
        if rng.random() < 0.6:  # the same words, the other way about
            other = f"{told.replace(introduction, exchanged(introduction, bound[2:]))} {question}"
        else:
            other = f"{told} {exchanged(question, bound)}"
        return self._filled(rng, f"{told} {question}", ending, other, OTHER_OF[ending])

    def _introduction(self, rng: random.Random, state: str, share: float = 1.0) -> str:
        """An introduction of the state; in half of them with the roles of first and second exchanged throughout."""
        texts = self._introductions[state]
        text = rng.choice(texts[: max(FEWEST, int(share * len(texts)))])
        return exchanged(text, STATES[state][0]) if rng.random() < 0.5 else text

    def _distracted(self, rng: random.Random, state: str, introduction: str, question: str) -> list[str]:
        """The introduction and, where that is not too long, another state of the same people or things beside it."""
        bound = STATES[state][0]
        # Who wants what and who has what would be told of the same things.
        others = [s for s, (b, _) in STATES.items() if set(b) & set(bound) and set(b) != set(bound)]
        another = rng.choice(others)
        text = self._introduction(rng, another)
        if rng.random() < 0.5:
            text = exchanged(text, STATES[another][0][2:])
        if len(f"{introduction} {text} {question}".split()) > LONGEST:
            return [introduction]
        return [text, introduction] if rng.random() < 0.5 else [introduction, text]

    def _situation(self, rng: random.Random) -> TwinText:
        text, ending = rng.choice(self._situations)
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z{])", text) if '"' not in text else [text]
        told = self._spaced(rng, sentences)
        return self._filled(rng, told, ending, exchanged(told, ending + OTHER_OF[ending]), OTHER_OF[ending])

    def _relation(self, rng: random.Random) -> TwinText:
        relation = rng.choice(self._relations)
        told = self._spaced(rng, [rng.choice(self._introductions[relation])])
        question, ending = rng.choice(self._questions[relation])
        text = f"{told} {question}"
        return self._filled(rng, text, ending, exchanged(text, "AB"), OTHER_OF[ending])

    def _pair(self, rng: random.Random) -> TwinText:
        return self._filled(rng, *rng.choice(self._pairs))

    def _spaced(self, rng: random.Random, sentences: list[str]) -> str:
        """The sentences in one, now and then with something that changes nothing before or between them."""
        said = [sentences[0]]
        for sentence in sentences[1:]:
            said += [rng.choice(self._words["between"]), sentence] if rng.random() < 0.2 else [sentence]
        if said[0].startswith("{") and rng.random() < 0.13:
            said.insert(0, rng.choice(self._words["opening"]))
        return " ".join(said)

    def _filled(self, rng: random.Random, text: str, ending: str, other: str, other_ending: str) -> TwinText:
        """Both texts with the same words in their slots, in either order."""
        w = self._words
        girl, boy = rng.choice(w["girl"]), rng.choice(w["boy"])
        named = rng.choices((0.95, 0.5, 0.05), (0.6, 0.2, 0.2))[0]  # as people, and not as "the fox"
        people: list[str] = []
        while len(people) < 3:
            person = rng.choice(rng.choice((w["girl"], w["boy"])) if rng.random() < named else w["other"])
            people += [person] if person not in people else []
        words = dict(zip("ABC", people, strict=True)) | {"girl": girl, "boy": boy}
        things = [thing for thing in w["thing"] if f"the {thing}" not in people]
        words |= zip("xyz", rng.sample(things, 3), strict=True)
        words |= zip("pqr", rng.sample([p for p in w["place"] if p not in words.values()], 3), strict=True)
        words |= zip("uv", rng.sample(w["person is"], 2), strict=True)
        words |= zip("cd", rng.sample(w["thing is"], 2), strict=True)
        twin = (filled(text, words), words[ending], filled(other, words), words[other_ending])
        return twin if rng.random() < 0.5 else (*twin[2:], *twin[:2])
