"""Stories as they are gathered from files: tidied, cleaned, counted, split. Knows nothing of torch."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

from model.errors import InputError
from model.intake_formats import N_PEEKED, TEXT_SUFFIXES, Limits, Table, harmless, listed, read_table, shown, suffix
from model.intake_text import SEPARATOR, cut, decode, plain_markdown, split_stories, tidy, unwrap
from model.training.data import UNSUITABLE, clean

TEXT_COLUMNS = ("text", "story", "stories", "content", "completion", "output", "response", "body")
PROMPT_COLUMNS = ("prompt", "idea", "instruction", "input", "title")
TEST_SPLITS = frozenset("test valid validation val dev eval heldout held-out held_out".split())
MAX_PROMPT_CHARACTERS = 300
GUESSED_CHARACTERS = 40  # of a row on average, in a column that is taken for the stories though not called so
HELD_OUT_SHARE, MAX_HELD_OUT, MIN_TO_HOLD_OUT = 0.1, 50, 5
LONG_STORY_WORDS = 1_000  # a file that is one such story may be several without borders


class StoryRow(TypedDict):
    """One story: clean text, what it was told from, and whether it is trained on or kept to judge by."""

    text: str
    prompt: str | None
    split: Literal["train", "test"]


@dataclass(frozen=True)
class Intake:
    """Stories that were read, with sentences for the reader about what was left out or guessed.

    `columns` are a table's, to choose from; [] when the stories came as plain text.
    """

    name: str
    rows: list[StoryRow]
    warnings: list[str]
    columns: list[str]
    text_column: str | None = None
    prompt_column: str | None = None


class Gathering:
    """Stories as they come in: tidied, cleaned, counted; `intake` says what became of them."""

    def __init__(
        self, name: str, limits: Limits, text_column: str | None = None, prompt_column: str | None = None
    ) -> None:
        self.name, self.limits = name, limits
        self.text_column, self.prompt_column = text_column, prompt_column
        self.columns: dict[str, None] = {}
        self.used_columns: tuple[str, str | None] | None = None
        self.rows: list[tuple[str, str | None, str]] = []  # text, prompt, what the row says of its split
        self.warnings: list[str] = []
        self.counts: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= self.limits.max_stories

    def add(self, text: str, prompt: object = None, split: object = None) -> None:
        """One story, with whatever its row says of prompt and split."""
        text = SEPARATOR.sub("", unwrap(tidy(text)))  # a border that is left is one of scenes
        prompt = " ".join(tidy(prompt).split()) if isinstance(prompt, str) else ""
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            self.counts["long prompt"] += 1
            prompt = ""
        parts = [text]
        if len(text) > self.limits.max_story_characters:
            # Smaller than they might be, so that some can be held out, and little is lost for one unsuitable word.
            parts = cut(text, max(1, self.limits.max_story_characters // 10))
            prompt = ""  # it promises a whole story
            self.counts["cut"] += 1
            self.counts["parts"] += len(parts)
        for part in map(clean, parts):
            if not re.search(r"\w", part):
                self.counts["empty"] += 1
            elif UNSUITABLE.search(part) or UNSUITABLE.search(prompt):
                self.counts["unsuitable"] += 1
            elif self.is_full:
                self.counts["over"] += 1
                return
            else:
                self.rows.append((part, prompt or None, str(split or "").strip().lower()))

    def add_text(self, text: str, is_markdown: bool = False) -> None:
        """The stories of one plain text."""
        text = unwrap(tidy(text))
        stories = split_stories(plain_markdown(text) if is_markdown else text)
        n_words = len(stories[0].split()) if len(stories) == 1 else 0
        if n_words > LONG_STORY_WORDS:
            self.warnings.append(
                f"{self.name} was read as one story of {n_words:,} words; training cuts it at paragraph ends. If it is "
                "several, put a line of *** between them."
            )
        self._add_all((story, None, None) for story in stories)

    def add_file(self, name: str, content: bytes | Path) -> None:
        """The stories of one file, by its name's ending."""
        if suffix(name) in TEXT_SUFFIXES:
            assert isinstance(content, bytes)
            text, warnings = decode(shown(name), content)
            self.warnings += warnings
            self.add_text(text, is_markdown=suffix(name) != ".txt")
        else:
            table, warnings = read_table(name, content, self.limits)
            self.warnings += warnings
            self._add_table(table, shown(name))

    def _add_table(self, table: Table, name: str) -> None:
        text_column, prompt_column = self._choose_columns(table, name)
        self.used_columns = self.used_columns or (text_column, prompt_column)
        self.columns |= dict.fromkeys(table.columns)
        split_column = _find(table.columns, ("split",))
        wanted = [column for column in (text_column, prompt_column, split_column) if column]
        self._add_all(
            (row.get(text_column), row.get(prompt_column or ""), row.get(split_column or ""))
            for row in table.read(list(dict.fromkeys(wanted)))
        )

    def _add_all(self, stories: Iterable[tuple[object, object, object]]) -> None:
        for text, prompt, split in stories:
            if self.is_full:
                self.counts["over"] += 1
                return
            if isinstance(text, str):
                self.add(text, prompt, split)
            else:
                self.counts["empty"] += 1

    def _choose_columns(self, table: Table, name: str) -> tuple[str, str | None]:
        """The text and prompt columns: those asked for, else by name, else (text) the one with the most text."""
        there = listed(table.columns)
        for asked in (self.text_column, self.prompt_column):
            if asked and asked not in table.columns:
                raise InputError(
                    f"{name} has no column '{harmless(asked)}'. Choose one of these: {there or 'it has none'}."
                )
        if not table.columns:
            raise InputError(f"{name} holds no rows with named columns. Give at least one story in a column 'text'.")
        text_column = self.text_column or _find(table.columns, TEXT_COLUMNS)
        if text_column is None:
            peeked = list(islice(table.read(table.columns), N_PEEKED))
            text_column = max(table.columns, key=lambda column: _n_characters(peeked, column))
            if _n_characters(peeked, text_column) < GUESSED_CHARACTERS * len(peeked):
                raise InputError(
                    f"{name} has no column 'text', and none with stories in it. Its columns: {there}. Choose one of "
                    "them, or rename the one that holds the stories to 'text'."
                )
            self.warnings.append(
                f"{name} has no column 'text'; the stories were taken from '{harmless(text_column)}', which holds the "
                "most text. Choose another column if that is wrong."
            )
        others = [column for column in table.columns if column != text_column]
        prompt_column = _find(others, PROMPT_COLUMNS) if self.prompt_column is None else self.prompt_column
        return text_column, prompt_column or None

    def intake(self) -> Intake:
        """Raises InputError when no story is left."""
        counts, n = self.counts, len(self.rows)
        if not n and counts["unsuitable"]:
            raise InputError(
                f"None of the stories of {self.name} can be used: {counts['unsuitable']:,} hold words that are "
                "unsuitable for children. Give others."
            )
        if not n:
            raise InputError(f"{self.name} holds no story. Give at least one with some words in it.")
        for kind, sentence in (
            ("unsuitable", "{:,} left out: words that are unsuitable for children."),
            ("empty", "{:,} left out: no text in them."),
            (
                "long prompt",
                f"{{:,}} used without the prompt, which is longer than {MAX_PROMPT_CHARACTERS} characters.",
            ),
        ):
            if counts[kind]:
                self.warnings.append("Stories: " + sentence.format(counts[kind]))
        if counts["cut"]:
            self.warnings.append(
                f"Texts longer than {self.limits.max_story_characters:,} characters: {counts['cut']:,}. They were cut "
                f"at paragraph ends into {counts['parts']:,} parts, each a story of its own."
            )
        if counts["over"]:
            self.warnings.append(f"Only the first {n:,} stories were taken; more are not used at once.")
        text_column, prompt_column = self.used_columns or (None, None)
        rows = self._split()
        return Intake(self.name, rows, self.warnings, list(self.columns), text_column, prompt_column)

    def _split(self) -> list[StoryRow]:
        """As the rows say when they name both kinds, else a tenth is held out, chosen by a hash of the text."""
        tests = [split in TEST_SPLITS for _, _, split in self.rows]
        if not any(tests) or all(tests):
            texts = {text for text, _, _ in self.rows}
            n = 0
            if len(texts) >= MIN_TO_HOLD_OUT:
                n = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(texts))))
            else:
                self.warnings.append(
                    f"With fewer than {MIN_TO_HOLD_OUT} different stories none is held out, so nothing can tell when "
                    "learning turns into memorising. Add more if you can."
                )
            # By text, so that a story that comes twice is not on both sides.
            held_out = set(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:n])
            tests = [text in held_out for text, _, _ in self.rows]
        return [
            {"text": text, "prompt": prompt, "split": "test" if is_test else "train"}
            for (text, prompt, _), is_test in zip(self.rows, tests, strict=True)
        ]


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first column called like one of the names, the earlier name first."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def _n_characters(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    return sum(len(value) for row in rows if isinstance(value := row.get(column), str))
