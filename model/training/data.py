"""From stories in files to rows of tokens on disk: read, clean, pair with ideas, tokenise, pack.

What training reads is one memory-mapped array of uint16, [n_rows, context + 1], laid out in the order in which it is
read: several epochs of a source are written out, each shuffled anew, so a step number alone says what comes next.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import write_atomically
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.training.contamination import contamination
from model.training.ideas import idea_for
from model.worlds.world import expand, read_worlds

# Stories with these words are left out: the readers are children.
UNSUITABLE = re.compile(
    r"\b(?:murder\w*|corpses?|suicide|sex|sexy|sexual\w*|rap(?:e|ed|ist)|naked|damn\w*|bitch\w*|whore\w*|bastard\w*"
    r"|cocaine|heroin|drunk\w*|vodka|whisky|whiskey|guns?|pistols?|stabb\w*|strangl\w*|tortur\w*|slaughter\w*|satan\w*"
    r"|mutilat\w*|lynch\w*|nigg\w*|fuck\w*|shit\w*|cigar\w*)\b",
    re.IGNORECASE,
)
CHATTER = re.compile(r"(?i)would you like|what happens next\?|to be continued|^moral of|^the end\.?$")
N_OPEN_ROWS = 256
HELD_OUT_SHARE = 0.01


@dataclass(frozen=True)
class Source:
    """One corpus of the mix: how often it is read in each part of training, and which of its rows count."""

    path: str = ""
    worlds: int = 0  # instead of a file: so many stories of the bundled story worlds
    epochs: float = 1.0
    anneal_epochs: float = 0.0  # read again in the last part, while the learning rate falls
    idea_share: float = 0.4  # part of its stories told from an idea
    where: Mapping[str, list[str]] = field(default_factory=dict)  # field -> values that a row may have

    @property
    def name(self) -> str:
        return "story worlds" if self.worlds else self.path

    def wants(self, row: Mapping[str, Any]) -> bool:
        return all(str(row.get(name)) in values for name, values in self.where.items())


def read_recipe(path: Path) -> list[Source]:
    """Read a TOML recipe: `[[source]]` tables with the fields of Source.

    Raises:
        InputError: no TOML, no source, or a field that Source does not have.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("source")
        sources = [Source(**table) for table in tables] if tables else []
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise InputError(f"The recipe {path} cannot be used: {error}") from error
    if not sources or not all(source.name for source in sources):
        raise InputError(f"The recipe {path} names no [[source]], or one without a path.")
    return sources


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL, TXT or Parquet file, each a dict with `text`.

    A text file holds stories separated by a line `<|endoftext|>`, or is one story.

    Raises:
        InputError: the file is missing, of another kind, or a line of it cannot be read (named by number).
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number} is no JSON: {error}") from error
                yield _checked(row, f"{path}, line {number}")
    elif path.suffix == ".txt":
        for text in path.read_text(encoding="utf-8", errors="replace").split("<|endoftext|>"):
            if text.strip():
                yield {"text": text.strip()}
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise InputError("Reading Parquet needs pyarrow (it comes with Streamlit): pip install pyarrow.") from error
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield _checked(row, f"A row of {path}")
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from error
    else:
        raise InputError(f"{path.name} is of a kind Taleloom cannot read. Use .jsonl, .txt or .parquet.")


def _checked(row: Any, where: str) -> dict[str, Any]:
    """A row with a usable text; raises InputError naming `where` it stands otherwise."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"{where} has no 'text'.")
    row["text"] = row["text"].encode(errors="replace").decode()  # half a surrogate pair cannot be tokenised
    return row


def _rows(source: Source, paths: Iterable[Path], seed: int) -> Iterator[dict[str, Any]]:
    if source.worlds:
        yield from expand(read_worlds(), source.worlds, seed)
    for path in paths:
        yield from read_rows(path)


def resolve_sources(
    datasets: Iterable[str], pull: Callable[[str], list[Path]], root: Path | None = None
) -> list[tuple[Source, list[Path]]]:
    """Turn each `--dataset` (a file, a .toml recipe or a Hub dataset id) into sources with their files.

    `pull` fetches a data set from the Hub. A recipe's paths are relative to `root`, and to the recipe's folder.
    """
    resolved: list[tuple[Source, list[Path]]] = []
    for dataset in datasets:
        path = Path(dataset)
        if path.suffix == ".toml":
            for source in read_recipe(path):
                places = [folder / source.path for folder in (root, path.parent) if folder]
                found = next((place for place in places if place.is_file()), places[0])
                resolved.append((source, [] if source.worlds else [found]))
        elif path.exists() or path.suffix in (".jsonl", ".txt", ".parquet"):
            resolved.append((Source(dataset), [path]))
        else:
            resolved.append((Source(dataset), pull(dataset)))
    return resolved


def clean(text: str) -> str:
    """One paragraph a line, without titles, markdown emphasis and remarks to the reader around the story."""
    text = text.replace("\r\n", "\n").replace("\0", "").replace("**", "")
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not line.startswith(("#", "---", "***"))]
    if len(lines) > 2 and len(lines[0]) < 70 and not re.search(r"[.!?,:;\"']$", lines[0]):
        lines = lines[1:]
    while len(lines) > 2 and CHATTER.search(lines[-1]):
        lines.pop()
    return "\n".join(lines)


def is_held_out(text: str) -> bool:
    """Whether a story belongs to the held-out split: decided by its own text, so it never moves."""
    digest = hashlib.sha256(text[:200].encode(errors="replace")).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def token_pieces(text: str, idea: str | None, tokenizer: Tokenizer, row_length: int) -> list[list[int]]:
    """A story as token sequences of at most row_length: one, or several split at paragraph ends when it is long.

    The idea goes with a story that fits whole: an idea promises a story with an end.
    """
    body = tokenizer.encode(text)
    if idea is not None and tokenizer.knows_ideas:
        whole = [*tokenizer.encode_idea(idea), *body, tokenizer.eos_id]
        if len(whole) <= row_length:
            return [whole]
    whole = [tokenizer.bos_id, *body, tokenizer.eos_id]
    newline = tokenizer.encode("\n")[0]
    pieces = []
    while len(whole) > row_length:
        # Cut after the last paragraph end in the second half, else where the row is full.
        ends = [i + 1 for i in range(row_length // 2, row_length) if whole[i] == newline]
        cut = ends[-1] if ends else row_length
        pieces.append(whole[:cut])
        whole = whole[cut:]
    return [*pieces, whole]


def pack(sequences: Iterable[list[int]], row_length: int, pad: int) -> Iterator[list[int]]:
    """Best-fit packing: each sequence goes whole into the fullest open row with room; rows are padded at the end."""
    open_rows: list[tuple[int, int]] = []  # (room left, key), sorted
    contents: dict[int, list[int]] = {}
    for key, sequence in enumerate(sequences):
        place = bisect.bisect_left(open_rows, (len(sequence), -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            contents[row] += sequence
        else:
            room, row = row_length, key
            contents[row] = list(sequence)
        bisect.insort(open_rows, (room - len(sequence), row))
        if open_rows[0][0] == 0 or len(open_rows) > N_OPEN_ROWS:
            left, full = open_rows.pop(0)
            yield contents.pop(full) + [pad] * left
    for left, row in open_rows:
        yield contents[row] + [pad] * left


def prepare(
    sources: list[tuple[Source, list[Path]]],
    out: Path,
    context: int,
    vocab_size: int = 4096,
    tokenizer: Tokenizer | None = None,
    seed: int = 1,
    asked: dict[str, Any] | None = None,
    validation: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Write tokenizer.model, rows.bin, heldout.jsonl and data.json into `out`; return what data.json says.

    Without a tokenizer one is trained on the stories, each source as often as the mix reads it (up to 4 times).
    `asked` is what the caller was asked for; it is kept, so that the next run can tell whether it wants the same.
    `validation` names texts that must not be trained on: what the corpus holds of them is reported (`contamination`).

    Raises:
        InputError: no usable story in the files.
    """
    rng = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    stories: list[tuple[Source, list[tuple[dict[str, Any], str]]]] = []
    held_out: list[dict[str, str]] = []
    counts = {}
    for source, paths in sources:
        kept: list[tuple[dict[str, Any], str]] = []
        n_read = n_unsuitable = 0
        for row in _rows(source, paths, seed):
            if not source.wants(row):
                continue
            n_read += 1
            text = clean(row.pop("text"))
            if UNSUITABLE.search(text):
                n_unsuitable += 1
            elif text and is_held_out(text) and not source.worlds:  # a world's stories are too much alike to judge by
                held_out.append({"source": source.name, "text": text})
            elif text:
                kept.append((row, text))
        stories.append((source, kept))
        counts[source.name] = {"read": n_read, "unsuitable": n_unsuitable, "kept": len(kept)}
    if not any(kept for _, kept in stories):
        raise InputError("There is no story to train on in these files.")

    if tokenizer is None:
        weighted = (
            text
            for source, kept in stories
            for _ in range(min(4, max(1, round(source.epochs + source.anneal_epochs))))
            for _, text in kept
        )
        tokenizer = Tokenizer.train(weighted, vocab_size)
    if tokenizer.vocab_size > 2**16:
        raise InputError("The tokenizer has more than 65,536 pieces, which do not fit the data format (uint16).")

    row_length = context + 1
    n_rows = 0
    n_tokens = 0
    with (out / "rows.bin").open("wb") as file:
        for stage in ("epochs", "anneal_epochs"):
            # Each epoch of each source is spread evenly over the stage, in a random order of its own.
            schedule = [
                ((epoch + rng.random() * min(1, epochs - epoch)) / epochs, which, i, rng.random())
                for which, (source, kept) in enumerate(stories)
                if (epochs := getattr(source, stage)) > 0
                for epoch in range(int(np.ceil(epochs)))
                for i in range(len(kept))
                if epoch + 1 <= epochs or rng.random() < epochs - epoch
            ]
            schedule.sort()

            def sequences() -> Iterator[list[int]]:
                for _, which, i, draw in schedule:  # noqa: B023 - used before the next stage
                    source, kept = stories[which]
                    row, text = kept[i]
                    idea = idea_for(row, text, rng) if draw < source.idea_share else None
                    yield from token_pieces(text, idea, tokenizer, row_length)

            for packed in pack(sequences(), row_length, tokenizer.pad_id):
                n_tokens += row_length - packed.count(tokenizer.pad_id)
                np.asarray(packed, np.uint16).tofile(file)
                n_rows += 1
    write_atomically(out / "tokenizer.model", tokenizer.serialized)
    write_atomically(out / "heldout.jsonl", "".join(json.dumps(row) + "\n" for row in held_out))
    summary = {
        "asked": asked,
        "context": context,
        "rows": n_rows,
        "tokens": n_tokens,
        "held_out": len(held_out),
        "sources": counts,
    }
    if validation:
        texts = [text for _, kept in stories for _, text in kept]
        summary["contamination"] = {name: contamination(texts, others) for name, others in validation.items()}
    write_atomically(out / "data.json", json.dumps(summary, indent=2))
    return summary


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, opened: `rows` is memory-mapped uint16 [n_rows, context + 1]."""

    rows: np.ndarray
    tokenizer: Tokenizer
    held_out: list[dict[str, str]]
    context: int

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """Raises InputError when the folder was not completely prepared."""
        try:
            summary = json.loads((folder / "data.json").read_text())
            row_length = summary["context"] + 1
            rows = np.memmap(folder / "rows.bin", np.uint16, mode="r").reshape(-1, row_length)
            held_out = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} holds no complete training data ({error}). Prepare it again.") from error
        if len(rows) != summary["rows"]:
            raise InputError(f"{folder}/rows.bin is incomplete. Delete the folder and prepare it again.")
        return cls(rows, Tokenizer.load(folder), held_out, summary["context"])
