"""Story worlds: little stories from plain data, each one consistent from its first sentence to its last.

A world is a TOML file without code (docs/worlds.md says how to write one). It names a cast, things and places to choose
from, and a chain of beats, each with several tellings. What was chosen and what a telling has set is the story's state;
options and tellings that do not go with it are never taken. Knows nothing of torch.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError

BUNDLED = Path(__file__).parent / "data"
PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "it": {"he": "it", "him": "it", "his": "its", "himself": "itself"},
}
SLOT = re.compile(r"\{([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?\}")
ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
ARTICLE = re.compile(r"\b([Aa])\(n\) (?=([\"']?\w+))")
VOWEL_SOUND = re.compile(r"[\"']?(?:(?!one\b|once\b|eu|uni[^mn]|use|usu|uku|ewe)[aeiou]|hour|honest)", re.IGNORECASE)
MAX_DEPTH = 6  # slots in slots
N_TRIES = 200

Option = dict[str, Any]
State = dict[str, Option]


@dataclass(frozen=True)
class Telling:
    """One way to tell a beat: its text, the state it needs, and what it sets."""

    text: str
    when: Mapping[str, Any]
    sets: Mapping[str, str]


@dataclass(frozen=True)
class Beat:
    """A step of the story; `paragraph` says whether it begins a new one."""

    name: str
    tellings: list[Telling]
    paragraph: bool


@dataclass(frozen=True)
class World:
    """A parsed world; `tell` makes stories of it."""

    name: str
    titles: list[str]
    ideas: list[str]
    words: list[str]
    choices: dict[str, list[Option]]  # cast and things, in the order of the file
    cast: frozenset[str]
    beats: list[Beat]

    @classmethod
    def read(cls, path: Path) -> World:
        """Parse and check a world file.

        Raises:
            InputError: it is no TOML or no world; the message names the place.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"The world {path} cannot be read: {error}") from error
        unknown = content.keys() - {"title", "ideas", "words", "cast", "pick", "beat"}
        if unknown:
            raise InputError(f"{path.name}: unknown {', '.join(sorted(unknown))}; see docs/worlds.md.")
        cast, picks = content.get("cast", {}), content.get("pick", {})
        for section, roles in (("cast", cast), ("pick", picks)):
            if not isinstance(roles, dict) or not all(
                isinstance(options, list) and options for options in roles.values()
            ):
                raise InputError(f"{path.name}: [{section}] should give each role a list of options.")
        if cast.keys() & picks.keys():
            raise InputError(f"{path.name}: {', '.join(cast.keys() & picks.keys())} is in both [cast] and [pick].")
        choices = {role: [_option(path, role, o) for o in options] for role, options in {**cast, **picks}.items()}
        for role in cast:
            for option in choices[role]:
                if option.get("pronoun") not in PRONOUNS or "kind" not in option:
                    raise InputError(
                        f"{path.name}: cast.{role} {option['name']!r} needs a kind and a pronoun: she, he, it."
                    )
        beats = [_beat(path, number, beat) for number, beat in enumerate(content.get("beat", []), 1)]
        world = cls(
            path.stem,
            _strings(path, content, "title"),
            _strings(path, content, "ideas"),
            _strings(path, content, "words"),
            choices,
            frozenset(cast),
            beats,
        )
        if not cast or not beats:
            raise InputError(f"{path.name}: a world needs a [cast] and at least one [[beat]].")
        world._check_slots(path)
        return world

    def tell(self, seed: int) -> dict[str, Any]:
        """One story: text, prompt, kind ("idea" or "words"), words, title, world, seed. The same seed tells the same.

        Raises:
            InputError: the options and tellings leave no way to the end.
        """
        rng = random.Random(f"{self.name} {seed}")
        for _ in range(N_TRIES):
            state = self._choose(rng)
            paragraphs = self._told(state, rng) if state is not None else None
            if state is not None and paragraphs:
                text = "\n".join(paragraphs)
                words = [self._render(word, state, rng) for word in self.words]
                words = [
                    w for w in dict.fromkeys(words) if re.search(rf"\b{re.escape(w)}(?:e?s)?\b", text, re.IGNORECASE)
                ]
                words = rng.sample(words, min(len(words), rng.choice((2, 3))))
                asks_words = bool(words) and rng.random() < 0.15
                idea = self._render(rng.choice(self.ideas), state, rng)
                return {
                    "text": text,
                    "prompt": "Use the words: " + ", ".join(words) if asks_words else idea,
                    "kind": "words" if asks_words else "idea",
                    "words": words,
                    "title": self._render(rng.choice(self.titles), state, rng),
                    "world": self.name,
                    "seed": seed,
                }
        raise InputError(f"The world {self.name} finds no way to its end: its options and tellings exclude each other.")

    def _choose(self, rng: random.Random) -> State | None:
        """An option for each role, no two of the cast with one name; None when the draw leads nowhere."""
        state: State = {}
        taken: set[str] = set()
        for role, options in self.choices.items():
            fitting = [o for o in options if _fits(o.get("when", {}), state)]
            if role in self.cast:
                fitting = [o for o in fitting if o["name"] not in taken]
            if not fitting:
                return None
            state[role] = rng.choice(fitting)
            if role in self.cast:
                taken.add(state[role]["name"])
        return state

    def _told(self, state: State, rng: random.Random) -> list[str] | None:
        paragraphs: list[str] = []
        for beat in self.beats:
            fitting = [telling for telling in beat.tellings if _fits(telling.when, state)]
            if not fitting:
                return None
            telling = rng.choice(fitting)
            text = self._render(telling.text, state, rng)
            for name, value in telling.sets.items():
                state[name] = {"name": value}
            told = [line.strip() for line in text.split("\n") if line.strip()]
            if told and paragraphs and not beat.paragraph:
                paragraphs[-1] += " " + told.pop(0)
            paragraphs += told
        return paragraphs

    def _render(self, text: str, state: State, rng: random.Random, depth: int = 0) -> str:
        """A text with its slots filled, its alternatives drawn and its articles chosen."""
        if depth > MAX_DEPTH:
            raise InputError(f"{self.name}: the slots in {text!r} refer to each other without end.")
        while match := ALTERNATIVES.search(text):
            text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]

        def fill(match: re.Match[str]) -> str:
            role, field = match[1], match[2] or "name"
            option = state.get(role[0].lower() + role[1:])
            if option is None:
                raise InputError(f"{self.name}: {{{role}}} is told where nothing has set it yet.")
            value = _field(option, field[0].lower() + field[1:])
            value = self._render(str(value), state, rng, depth + 1)
            capital = role[0].isupper() or field[0].isupper()
            return value[:1].upper() + value[1:] if capital else value

        text = SLOT.sub(fill, text)
        text = ARTICLE.sub(lambda m: f"{m[1]}n " if VOWEL_SOUND.match(m[2]) else f"{m[1]} ", text)
        return re.sub(r"[ \t]+", " ", text).strip() if depth == 0 else text

    def _check_slots(self, path: Path) -> None:
        """Every slot names a role, and a field that all of its options have; every `when` names what can be."""
        sets: dict[str, set[str]] = {}
        for beat in self.beats:
            for telling in beat.tellings:
                for name, value in telling.sets.items():
                    if name in self.choices:
                        raise InputError(f"{path.name}, beat {beat.name}: set cannot change {name!r}, which is chosen.")
                    sets.setdefault(name, set()).add(value)
        texts = (
            [("title", t) for t in self.titles]
            + [("ideas", t) for t in self.ideas]
            + [("words", t) for t in self.words]
        )
        texts += [(f"beat {beat.name}", telling.text) for beat in self.beats for telling in beat.tellings]
        conditions = [(f"beat {b.name}", t.when, {*self.choices, *sets}) for b in self.beats for t in b.tellings]
        earlier: set[str] = set()
        for role, options in self.choices.items():
            for option in options:
                texts += [
                    (f"{role} {option['name']}", v) for k, v in option.items() if isinstance(v, str) and k != "pronoun"
                ]
                conditions.append((f"{role} {option['name']}", option.get("when", {}), set(earlier)))
            earlier.add(role)
        for where, text in texts:
            for role, field in SLOT.findall(text):
                role, field = role[0].lower() + role[1:], (field or "name")[0].lower() + (field or "name")[1:]
                if role in sets and field == "name":
                    continue
                if role not in self.choices:
                    raise InputError(f"{path.name}, {where}: there is no {{{role}}} in [cast] or [pick].")
                lacking = [o["name"] for o in self.choices[role] if not _has(o, field)]
                if lacking:
                    raise InputError(f"{path.name}, {where}: {{{role}.{field}}} is missing for {', '.join(lacking)}.")
            rest = ALTERNATIVES.sub("", SLOT.sub("", text))
            if re.search(r"[{}\[\]|]", rest) and not ALTERNATIVES.search(text):
                raise InputError(f"{path.name}, {where}: unbalanced brackets in {text!r}.")
        for where, when, known in conditions:
            for role, wanted in when.items():
                if role not in known:
                    raise InputError(f"{path.name}, {where}: when names {role!r}, which is not known there.")
                possible = set(sets.get(role, set()))
                for option in self.choices.get(role, []):
                    possible |= _tags(option)
                for value in [wanted] if isinstance(wanted, str) else wanted:
                    if value.removeprefix("!") not in possible:
                        raise InputError(f"{path.name}, {where}: {role} is never {value.removeprefix('!')!r}.")


def read_worlds(folder: Path = BUNDLED, names: tuple[str, ...] = ()) -> list[World]:
    """The worlds of a folder in the order of their names, or the named ones; raises InputError for an unknown name."""
    worlds = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if unknown := [name for name in names if name not in worlds]:
        raise InputError(f"There is no world {', '.join(unknown)}. There are: {', '.join(worlds)}.")
    return [World.read(worlds[name]) for name in (names or worlds)]


def expand(worlds: list[World], n: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` stories without repetition, the worlds in turn; fewer when the worlds have no more to tell."""
    told: set[str] = set()
    missed = dict.fromkeys((world.name for world in worlds), 0)
    number = 0
    while len(told) < n and (open_worlds := [world for world in worlds if missed[world.name] < 50]):
        for world in open_worlds:
            story = world.tell(seed * 1_000_003 + number)
            if story["text"] in told:
                missed[world.name] += 1
                continue
            missed[world.name] = 0
            told.add(story["text"])
            yield story
            if len(told) == n:
                return
        number += 1


def _tags(option: Option) -> set[str]:
    """What an option counts as in a `when`: its name, its kind, and what it says it `is`."""
    tags = option.get("is", [])
    return {option["name"], option.get("kind", option["name"]), *([tags] if isinstance(tags, str) else tags)}


def _fits(when: Mapping[str, Any], state: State) -> bool:
    """Whether the state has, for every name, one of the wanted values and none of those with a "!" before them."""
    for role, wanted in when.items():
        tags = _tags(state[role]) if role in state else set()
        values = [wanted] if isinstance(wanted, str) else wanted
        refused = {value[1:] for value in values if value.startswith("!")}
        asked = {value for value in values if not value.startswith("!")}
        if tags & refused or (asked and not tags & asked):
            return False
    return True


def _has(option: Option, field: str) -> bool:
    return field in option or (field in PRONOUNS["he"] and "pronoun" in option)


def _field(option: Option, field: str) -> Any:
    if field in option:
        return option[field]
    return PRONOUNS[option["pronoun"]][field]


def _option(path: Path, role: str, option: Any) -> Option:
    option = {"name": option} if isinstance(option, str) else option
    if not isinstance(option, dict) or not isinstance(option.get("name"), str):
        raise InputError(f"{path.name}: an option of {role} is neither a text nor a table with a name.")
    _check_when(path, role, option.get("when", {}))
    return option


def _check_when(path: Path, where: str, when: Any) -> None:
    values = (
        [v for wanted in when.values() for v in (wanted if isinstance(wanted, list) else [wanted])]
        if isinstance(when, dict)
        else [0]
    )
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{path.name}, {where}: when should be a table of texts or lists of texts.")


def _beat(path: Path, number: int, beat: Any) -> Beat:
    name = str(beat.get("name", number)) if isinstance(beat, dict) else str(number)
    if not isinstance(beat, dict) or not isinstance(beat.get("tellings"), list) or not beat["tellings"]:
        raise InputError(f"{path.name}: beat {name} has no tellings.")
    if unknown := beat.keys() - {"name", "tellings", "paragraph"}:
        raise InputError(f"{path.name}: beat {name} has an unknown {', '.join(sorted(unknown))}.")
    tellings = []
    for telling in beat["tellings"]:
        telling = {"text": telling} if isinstance(telling, str) else telling
        if not isinstance(telling, dict) or not isinstance(telling.get("text"), str):
            raise InputError(f"{path.name}: a telling of beat {name} has no text.")
        if unknown := telling.keys() - {"text", "when", "set"}:
            raise InputError(f"{path.name}: a telling of beat {name} has an unknown {', '.join(sorted(unknown))}.")
        _check_when(path, f"beat {name}", telling.get("when", {}))
        sets = telling.get("set", {})
        if not isinstance(sets, dict) or not all(isinstance(value, str) for value in sets.values()):
            raise InputError(f"{path.name}, beat {name}: set should be a table of texts.")
        tellings.append(Telling(telling["text"].strip(), telling.get("when", {}), telling.get("set", {})))
    return Beat(name, tellings, bool(beat.get("paragraph", True)))


def _strings(path: Path, content: Mapping[str, Any], name: str) -> list[str]:
    value = content.get(name)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise InputError(f"{path.name}: {name} should be a text or a list of texts.")
    return value
