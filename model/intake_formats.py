"""Readers' files: which are taken, what a table's rows are, what a ZIP holds. Nothing is written or executed."""

from __future__ import annotations

import csv
import io
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model.checkpoint import PICKLE_SUFFIXES
from model.errors import InputError
from model.intake_text import decode

TEXT_SUFFIXES = (".txt", ".md", ".markdown")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
READABLE = "TXT, MD, JSONL, JSON, CSV, TSV, PARQUET, or a ZIP of such files"
CODE_SUFFIXES = (*PICKLE_SUFFIXES, ".npy", ".npz", ".joblib")
CODE_MAGIC = re.compile(rb"\x80[\x02-\x05]|\x93NUMPY")  # a pickle of protocol 2 to 5, NumPy's own format
N_PEEKED = 50  # rows by which a table's columns are judged
MAX_COLUMNS = 1_000
MAX_UNPACKED = 4  # times max_bytes
LINE_ENDS = ("", "\n", "\r", "\r\n")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)?")


@dataclass(frozen=True)
class Limits:
    """How much is taken at once. Bytes and characters; `max_tokens` is of all stories to train on (None: any).

    What is parsed takes many times its bytes in memory: JSON up to 25 times, text of very short paragraphs 50 times.
    So each file of a ZIP is limited as if it came alone, and what must be parsed at once is limited further.
    """

    max_bytes: int = 50_000_000  # of one file, also of each in a ZIP
    max_stories: int = 20_000
    max_story_characters: int = 100_000
    max_unpacked_bytes: int = 200_000_000  # of all files of a ZIP, or a Parquet file; never more than 4 x max_bytes
    max_json_bytes: int = 10_000_000  # of a .json file, which is parsed whole
    max_row_characters: int = 2_000_000  # of a row of a table, or a line of JSON
    max_files: int = 2_000
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_unpacked_bytes", min(self.max_unpacked_bytes, MAX_UNPACKED * self.max_bytes))


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Table:
    """Rows with named columns; `read(columns)` yields them anew, other columns left out where that saves work."""

    columns: list[str]
    read: Callable[[Sequence[str]], Iterator[Mapping[str, Any]]]


def shown(name: str) -> str:
    """A file's name as a message can show it: without its folders, on one line, not too long."""
    return harmless(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) or "The file"


def harmless(name: str) -> str:
    """Somebody else's name for a thing, without line ends and markup, not too long."""
    return re.sub(r"[^\w .,()+@=#&'/-]", "?", name)[:80]


def listed(names: Sequence[str]) -> str:
    """Names to choose from, at most 20."""
    return ", ".join(map(harmless, names[:20])) + (", ..." if len(names) > 20 else "")


def size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 1e6 else f"{n_bytes:,} bytes"


def suffix(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).suffix.lower()


def refuse_code(name: str, content: bytes) -> None:
    """Raises InputError for a pickle and its relatives, by name or by content: opening one can run code."""
    if suffix(name) in CODE_SUFFIXES or CODE_MAGIC.match(content):
        raise InputError(
            f"{shown(name)} is a pickle or array file. Such a file can run code when opened, so Taleloom never opens "
            f"it. Give the stories as {READABLE}."
        )


def read_table(name: str, content: bytes | Path, limits: Limits = DEFAULT_LIMITS) -> tuple[Table, list[str]]:
    """A table and warnings, from the bytes of a file or (Parquet only) its path.

    Raises:
        InputError: it cannot be read as what its name says; broken lines are named by number, also while reading.
    """
    kind = suffix(name)
    if kind == ".parquet":
        return _parquet(shown(name), content, limits), []
    assert isinstance(content, bytes)
    name = shown(name)
    if kind == ".json" and len(content) > limits.max_json_bytes:
        raise InputError(
            f"{name} has {size(len(content))}; {size(limits.max_json_bytes)} are the most for a .json file, which is "
            "read whole. Save it as JSON lines (.jsonl, one story a line), or give a part of it."
        )
    text, warnings = decode(name, content)
    if kind in (".csv", ".tsv"):
        return _csv(name, text, "\t" if kind == ".tsv" else None, limits), warnings
    rows = _json_rows(name, text) if kind == ".json" else None
    if rows is None:
        return _table_of(name, lambda: _json_lines(name, text, limits)), warnings
    return _table_of(name, lambda: iter(rows)), warnings


def _table_of(name: str, rows: Callable[[], Iterator[Mapping[str, Any]]]) -> Table:
    columns: dict[str, None] = {}
    for _, row in zip(range(N_PEEKED), rows(), strict=False):
        columns |= dict.fromkeys(column for column in row if column)
        if len(columns) > MAX_COLUMNS:
            raise InputError(f"{name} has more than {MAX_COLUMNS:,} columns. Give a table of stories with fewer.")
    return Table(list(columns), lambda _: rows())


def _row_too_long(where: str, limits: Limits) -> InputError:
    return InputError(
        f"{where} has more than {limits.max_row_characters:,} characters. Give each story a row of its own, and longer "
        "texts as TXT."
    )


def _json_row(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise InputError(f'{where} is neither an object nor a text. Write each story as {{"text": "..."}}.')
    return row


def _json_lines(name: str, text: str, limits: Limits) -> Iterator[dict[str, Any]]:
    number, start = 0, 0
    while start < len(text):  # not splitlines: a JSON text may hold U+2028; nor split, which copies all of it
        number, end = number + 1, text.find("\n", start)
        end = end if end >= 0 else len(text)
        if end - start > limits.max_row_characters:
            raise _row_too_long(f"Line {number} of {name}", limits)
        line, start = text[start:end], end + 1
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"Line {number} of {name} is no JSON ({error}). Correct it or take it out.") from error
            yield _json_row(row, f"Line {number} of {name}")


def _json_rows(name: str, text: str) -> list[dict[str, Any]] | None:
    """The rows of a JSON file: a list, or an object that holds one; None when it is rather JSON lines."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            return None
        raise InputError(f"{name} is no JSON ({error}). Correct it and try again.") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else [data]
    if not isinstance(data, list):
        raise InputError(f'{name} holds no list of stories. Write it as [{{"text": "..."}}, ...].')
    return [_json_row(row, f"Item {number} of {name}") for number, row in enumerate(data, 1)]


def _csv(name: str, text: str, delimiter: str | None, limits: Limits) -> Table:
    header = next((line for match in LINE.finditer(text) if (line := match[0].strip("\r\n"))), "")
    delimiter = delimiter or max(",;\t|", key=header.count)

    def rows() -> Iterator[dict[str, Any]]:
        n_characters = 0  # since the row before

        def lines() -> Iterator[str]:
            nonlocal n_characters
            for number, match in enumerate(LINE.finditer(text), 1):
                if n_characters + match.end() - match.start() > limits.max_row_characters:
                    raise _row_too_long(f"The row in line {number} of {name}", limits)
                if (line := match[0]) not in LINE_ENDS:  # those are between two rows, or in a field, which csv limits
                    n_characters += len(line)
                if line:
                    yield line

        reader = csv.DictReader(lines(), delimiter=delimiter)
        try:
            for row in reader:
                n_characters = 0
                yield {column: value for column, value in row.items() if column}
        except csv.Error as error:
            raise InputError(
                f"The row that begins in line {reader.line_num + 1} of {name} cannot be read ({error}). Is a "
                "quotation mark left open there? Close it."
            ) from error

    return _table_of(name, rows)


def _parquet(name: str, content: bytes | Path, limits: Limits) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Reading Parquet needs pyarrow (it comes with Streamlit): pip install pyarrow.") from error
    failures = (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)
    damaged = f"{name} cannot be read as Parquet. It may be damaged or incomplete; make it again."

    def opened(columns: Sequence[str] = ()) -> Any:
        source = content if isinstance(content, Path) else pyarrow.BufferReader(content)
        # A text that comes often stays one text in memory, so that a small file cannot become a huge table.
        return pyarrow.parquet.ParquetFile(source, read_dictionary=list(columns))

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)

    try:
        file = opened()
        columns = [field.name for field in file.schema_arrow if is_text(field.type)]
        names, metadata = file.schema_arrow.names, file.metadata
        n_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    except failures as error:
        raise InputError(damaged) from error
    if not columns:
        raise InputError(f"{name} has no column of text. Its columns: {listed(names)}.")
    if n_bytes > limits.max_unpacked_bytes and not isinstance(content, Path):
        raise InputError(
            f"{name} unpacks to {size(n_bytes)}; {size(limits.max_unpacked_bytes)} are the most. Give a part of it."
        )

    def rows(wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        wanted = [column for column in wanted if column in columns]
        n_read = 0
        try:
            for batch in opened(wanted).iter_batches(columns=wanted, batch_size=256):
                for i in range(batch.num_rows):
                    row = {column: batch.column(column)[i].as_py() for column in wanted}
                    n_read += sum(len(value or "") for value in row.values())
                    if n_read > limits.max_unpacked_bytes:
                        return
                    yield row
        except failures as error:
            raise InputError(damaged) from error

    return Table(columns, rows)


def read_zip(name: str, content: bytes, limits: Limits) -> tuple[Iterator[tuple[str, bytes]], list[str]]:
    """The readable files of a ZIP, (path, content) in its order, and warnings. Everything stays in memory.

    Raises:
        InputError: it is damaged, encrypted, too large unpacked (declared or found), holds an archive, a pickle, or a
            name that points outside it. Names are checked before the first file is unpacked.
    """
    too_many = f"{name} holds more than {limits.max_files:,} files. Give fewer at a time."
    if content.count(b"PK\x01\x02") > limits.max_files:  # before zipfile makes an object of each
        raise InputError(too_many)
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{name} is no ZIP file, or damaged. Pack it again.") from error
    members = [info for info in archive.infolist() if not info.is_dir()]
    if len(members) > limits.max_files:
        raise InputError(too_many)
    if (n_bytes := sum(info.file_size for info in members)) > limits.max_unpacked_bytes:
        raise InputError(
            f"{name} unpacks to {size(n_bytes)}; {size(limits.max_unpacked_bytes)} are the most. Give a part of it."
        )
    chosen: list[zipfile.ZipInfo] = []
    skipped: list[zipfile.ZipInfo] = []
    for info in members:
        path = info.filename.replace("\\", "/")
        parts = path.split("/")
        if ".." in parts or path.startswith("/") or ":" in parts[0] or stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(
                f"{name} holds '{harmless(path)}', which points outside it. Nothing was used; pack a plain folder."
            )
        refuse_code(path, b"")
        if suffix(path) == ".zip":
            raise InputError(f"{name} holds another ZIP ({shown(path)}). Unpack that one and pack its files directly.")
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue  # what operating systems add
        (chosen if suffix(path) in TEXT_SUFFIXES + TABLE_SUFFIXES else skipped).append(info)
    if not chosen:
        raise InputError(
            f"{name} holds no file Taleloom can read. Pack {READABLE.removesuffix(', or a ZIP of such files')}."
        )
    if large := next((info for info in chosen if info.file_size > limits.max_bytes), None):
        raise InputError(
            f"{shown(large.filename)} in {name} has {size(large.file_size)}; {size(limits.max_bytes)} are the most for "
            "a file. Give a part of it."
        )
    warnings = []
    if skipped:
        names = ", ".join(shown(info.filename) for info in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        warnings.append(f"{len(skipped):,} other files of {name} were left out ({names}).")
    return _unpacked(name, archive, chosen, limits), warnings


def _unpacked(
    name: str, archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], limits: Limits
) -> Iterator[tuple[str, bytes]]:
    room = limits.max_unpacked_bytes
    for info in members:
        if info.flag_bits & 1:
            raise InputError(f"{name} is encrypted. Pack it without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{shown(info.filename)} in {name} is packed in an unusual way. Use an ordinary ZIP.")
        try:
            with archive.open(info) as file:
                content = file.read(room + 1)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
            raise InputError(f"{shown(info.filename)} in {name} is damaged. Pack it again.") from error
        room -= len(content)
        if room < 0:
            raise InputError(f"{name} unpacks to more than {size(limits.max_unpacked_bytes)}. Give a part of it.")
        refuse_code(info.filename, content)
        yield info.filename, content
