"""Readers' own stories: every format, and everything strangers may send instead."""

import contextlib
import csv
import io
import json
import pickle
import random
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import intake_text
from model.checkpoint import read_config
from model.config import CHECKOUT, FINE_TUNE_PRESETS, FineTuneSettings
from model.errors import InputError
from model.hub.pull import choose_split_files
from model.intake import (
    Limits,
    check,
    estimate,
    read_dataset,
    read_file,
    read_paste,
    read_sample,
    read_upload,
)
from model.intake_formats import MAX_COLUMNS, TABLE_SUFFIXES, TEXT_SUFFIXES
from model.tokenizer import Tokenizer
from model.training.data import pack, token_pieces

MIA = "Mia found a red kite in the garden. She was happy."
TOM = "Tom lost the silver key. The fox carried it home."
OWL = "The old owl painted the moon. Nobody saw it."


def texts(intake) -> list[str]:
    return [row["text"] for row in intake.rows]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns, **options) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def zipped(files, compression=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def no_traces(tmp_path, monkeypatch):
    """A working folder, a temporary folder and a home, all empty; they must be empty afterwards too."""
    for name in ("here", "tmp", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TALELOOM_HOME", str(tmp_path / "home"))
    yield tmp_path
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "home", "tmp"]


# Formats.

ROWS = [{"text": MIA, "prompt": "a kite"}, {"text": TOM, "prompt": ""}, {"text": OWL, "prompt": None}]


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["prompt", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.jsonl", jsonl(ROWS)),
        ("s.ndjson", jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
        ("s.json", json.dumps(ROWS, indent=2).encode()),
        ("s.json", json.dumps({"about": "stories", "rows": ROWS}).encode()),
        ("lines.json", jsonl(ROWS)),
        ("s.csv", as_csv(",")),
        ("german.csv", as_csv(";")),
        ("s.tsv", as_csv("\t")),
        ("S.PARQUET", parquet({name: [row[name] for row in ROWS] for name in ("text", "prompt")})),
        ("s.zip", zipped({"folder/s.jsonl": jsonl(ROWS)})),
    ],
)
def test_a_table_of_any_kind_gives_the_same_stories(name, content):
    intake = read_upload(name, content)
    assert [(row["text"], row["prompt"]) for row in intake.rows] == [(MIA, "a kite"), (TOM, None), (OWL, None)]
    assert sorted(intake.columns) == ["prompt", "text"]
    assert (intake.text_column, intake.prompt_column, intake.name) == ("text", "prompt", name)
    assert all(row["split"] == "train" for row in intake.rows)
    (warning,) = intake.warnings
    assert "none is held out" in warning


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("s.txt", "\n<|endoftext|>\n"),
        ("s.txt", "\n***\n"),
        ("s.txt", "\n\n* * *\n\n"),
        ("s.txt", "\n---\n"),
        ("s.txt", "\r\n=====\r\n"),
        ("s.txt", "\n\n\n"),
        ("s.txt", "\n \n\t\n\n"),
        ("s.md", "\n# The next one\n"),
        ("s.md", "\n\nThe next one\n============\n\n"),
        ("s.MD", "\n\n***\n\n"),
    ],
)
def test_borders_between_stories(name, between):
    content = between.join([MIA, TOM, OWL])
    assert texts(read_upload(name, content.encode())) == [MIA, TOM, OWL]
    if name == "s.txt":
        assert texts(read_paste(content)) == [MIA, TOM, OWL]


def test_the_first_kind_of_border_counts_and_the_others_belong_to_the_stories():
    text = f"{MIA}\n\n***\n\n{TOM}\n<|endoftext|>\n{OWL}"
    assert texts(read_paste(text)) == [f"{MIA}\n{TOM}", OWL]
    text = f"# A book\n\n## One\n\n{MIA}\n\n\n\n{TOM}\n\n## Two\n\n{OWL}"
    assert texts(read_paste(text)) == [f"{MIA}\n{TOM}", OWL]
    assert texts(read_paste(f"{MIA}\n\n{TOM}")) == [f"{MIA}\n{TOM}"], "an empty line ends a paragraph only"


def test_markdown_is_read_as_text():
    text = f"""---
title: Kites
tags: [a, b]
---
<!-- draft -->
# The Kite

![a kite](kite.png)
> Mia found a [red kite](http://x.y) in the *garden*. She was __happy__ with snake_case_words.

# The Key

{TOM}
"""
    kite = "Mia found a red kite in the garden. She was happy with snake_case_words."
    assert texts(read_upload("s.md", text.encode())) == [kite, TOM]


def test_what_typewriters_and_word_processors_add_is_made_plain():
    text = (
        "\ufeff\u201cOh\u201d\u2014said\u00a0Mia\u2026 \u2018it\u2019s\u200b a kite\u2019, "
        "and cafe\u0301s\u00ad.\rTom\u2028Ben \ud800"
    )
    assert texts(read_paste(text)) == ["\"Oh\" - said Mia... 'it's a kite', and caf\u00e9s.\nTom\nBen ?"]


def test_lines_broken_for_their_width_are_joined_and_verse_is_not():
    rng = random.Random(1)
    words = [rng.choice("a the fox kite garden wandered silver moon under".split()) for _ in range(120)]
    lines = [""]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > 70:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    wrapped = "\n".join(lines)
    stories = texts(read_paste(f"{wrapped}\n\n{MIA}\n\n\n{TOM}"))
    assert stories == [" ".join(words) + "\n" + MIA, TOM]
    verse = "The moon is up, the moon is high,\nthe owl sits on a silver sky,\nand sings.\n" * 5
    assert texts(read_paste(verse)) == [verse.strip()]
    paragraphs = "\n".join([MIA, TOM, OWL] * 3)
    assert texts(read_paste(paragraphs)) == [paragraphs]


# Columns.


def test_columns_are_found_by_name_or_chosen():
    rows = [{"id": i, "Story": MIA + str(i), "title": "a", "other": TOM} for i in range(3)]
    intake = read_upload("s.jsonl", jsonl(rows))
    assert (intake.text_column, intake.prompt_column) == ("Story", "title")
    assert intake.columns == ["id", "Story", "title", "other"]
    intake = read_upload("s.jsonl", jsonl(rows), text_column="other", prompt_column="")
    assert texts(intake) == [TOM] * 3 and intake.rows[0]["prompt"] is None and intake.prompt_column is None
    intake = read_upload("s.jsonl", jsonl([{"n": "1", "narrative": MIA}]))
    assert texts(intake) == [MIA] and "taken from 'narrative'" in intake.warnings[0]


@pytest.mark.parametrize("name", ["s.jsonl", "s.csv", "s.parquet", "s.json"])
@pytest.mark.parametrize("asked", [{}, {"text_column": "story"}, {"prompt_column": "idea"}])
def test_a_wrong_column_is_answered_with_those_that_are_there(name, asked, no_traces):
    rows = [{"name": "Mia", "age": "five"}] * 3
    content = {
        "s.jsonl": jsonl(rows),
        "s.csv": b"name,age\nMia,five\n",
        "s.parquet": parquet({"name": ["Mia"], "age": ["five"]}),
        "s.json": json.dumps(rows).encode(),
    }[name]
    with pytest.raises(InputError, match=r"no column .*name, age"):
        read_upload(name, content, **asked)


def test_rows_without_text_and_overlong_prompts_are_counted():
    rows = [{"text": MIA}, {"text": None}, {"other": 1}, {"text": "  \n"}, {"text": "***"}, {"text": TOM}]
    rows.append({"text": OWL, "prompt": "x" * 1000})
    intake = read_upload("s.jsonl", jsonl(rows))
    assert texts(intake) == [MIA, TOM, OWL] and intake.rows[2]["prompt"] is None
    assert "Stories: 4 left out: no text in them." in intake.warnings
    assert any(w.startswith("Stories: 1 used without the prompt") for w in intake.warnings)


# Held-out stories.


@pytest.mark.parametrize(("n", "n_test"), [(1, 0), (4, 0), (5, 1), (14, 1), (20, 2), (100, 10), (1000, 50)])
def test_a_tenth_is_held_out(n, n_test):
    rows = [{"text": f"Story {i}. {MIA}"} for i in range(n)]
    intake = read_upload("s.jsonl", jsonl(rows))
    held_out = {row["text"] for row in intake.rows if row["split"] == "test"}
    assert len(held_out) == n_test and len(intake.rows) == n
    assert any("none is held out" in w for w in intake.warnings) == (n_test == 0)
    random.Random(1).shuffle(rows)
    again = read_upload("s.jsonl", jsonl(rows))
    assert {row["text"] for row in again.rows if row["split"] == "test"} == held_out, "decided by the text alone"


def test_a_story_that_comes_twice_is_on_one_side_only():
    intake = read_upload("s.jsonl", jsonl([{"text": f"Story {i}. {MIA}"} for i in range(30)] * 3))
    sides = {split: {r["text"] for r in intake.rows if r["split"] == split} for split in ("train", "test")}
    assert len(sides["test"]) == 3 and not sides["train"] & sides["test"]


def test_a_split_that_the_rows_bring_is_kept():
    rows = [{"text": f"{i} {MIA}", "split": "validation" if i % 3 == 0 else "train"} for i in range(9)]
    intake = read_upload("s.jsonl", jsonl(rows))
    assert [row["split"] for row in intake.rows] == ["test", "train", "train"] * 3
    for only in ("train", "test"):
        intake = read_upload("s.jsonl", jsonl([{**row, "split": only} for row in rows]))
        assert [row["split"] for row in intake.rows].count("test") == 1, "one side alone is no split"


# Encodings.

FRENCH = "Zo\u00eb mange une cr\u00eape \u00e0 No\u00ebl. \u20ac5, dit-elle."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["s.txt", "s.jsonl", "s.csv"])
def test_every_usual_encoding(name, encoding):
    text = {
        "s.txt": FRENCH,
        "s.jsonl": json.dumps({"text": FRENCH}, ensure_ascii=False),
        "s.csv": f'text\n"{FRENCH}"\n',
    }[name]
    intake = read_upload(name, text.encode(encoding))
    assert texts(intake) == [FRENCH]
    assert any("Windows-1252" in w for w in intake.warnings) == (encoding == "cp1252")


@pytest.mark.parametrize("bom", [b"\xfe\xff", b"\x00\x00\xfe\xff"])
def test_big_endian_byte_order_marks(bom):
    encoding = {2: "utf-16-be", 4: "utf-32-be"}[len(bom)]
    assert texts(read_upload("s.txt", bom + FRENCH.encode(encoding))) == [FRENCH]


def test_a_file_glued_together_from_two_encodings_keeps_both():
    content = f"{FRENCH}\n***\n".encode() + f"2 {FRENCH}".encode("cp1252") + b"\n***\nDelete \x81 me not."
    intake = read_upload("s.txt", content)
    assert texts(intake) == [FRENCH, f"2 {FRENCH}", "Delete me not."]
    assert intake.warnings[0].startswith("2 lines of s.txt")


# What strangers may send.


class Bomb:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return (Path("executed").write_text, ("!",))


def torch_file() -> bytes:
    return zipped({"archive/data.pkl": pickle.dumps(Bomb()), "archive/version": b"3"}, zipfile.ZIP_STORED)


def declared_smaller(content: bytes, declared: int) -> bytes:
    """A ZIP whose directory says that its only file unpacks to so few bytes."""
    data = bytearray(content)
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = data.index(signature) + offset
        data[at : at + 4] = declared.to_bytes(4, "little")
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(zipped({"s.txt": MIA}))
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


def link() -> bytes:
    info = zipfile.ZipInfo("s.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped({info: "/etc/passwd"})


NOISE = random.Random(1).randbytes(3000)
BAD = {
    "empty": ("s.txt", b"", "is empty"),
    "empty table": ("s.csv", b"", "is empty"),
    "blank": ("s.txt", b" \n\t\r\n ", "holds no story"),
    "only a byte order mark": ("s.txt", b"\xef\xbb\xbf", "holds no story"),
    "only borders": ("s.md", b"***\n***\n# Title\n", "holds no story"),
    "binary as text": ("s.txt", NOISE, "is no text"),
    "binary without NUL": ("s.txt", NOISE.replace(b"\0", b""), "is no text"),
    "picture as text": ("s.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + NOISE, "is no text"),
    "UTF-16 without a mark": ("s.txt", MIA.encode("utf-16-le"), "is no text"),
    "half of UTF-16": ("s.txt", b"\xff\xfe" + MIA.encode("utf-16-le") + b"\x00", "damaged, or no UTF-16"),
    "binary as JSON lines": ("s.jsonl", NOISE, "is no text"),
    "binary as CSV": ("s.csv", NOISE, "is no text"),
    "binary as Parquet": ("s.parquet", NOISE, "cannot be read as Parquet"),
    "half a Parquet": ("s.parquet", parquet({"text": [MIA] * 50})[:-100], "cannot be read as Parquet"),
    "numbers in Parquet": ("s.parquet", parquet({"x": [1], "y": [2.0]}), "no column of text. Its columns: x, y"),
    "another kind": ("s.docx", zipped({"word/document.xml": "<x/>"}), "of a kind Taleloom cannot read. Give TXT"),
    "no ending": ("stories", MIA.encode(), "of a kind"),
    "broken line": ("s.jsonl", jsonl([{"text": MIA}] * 2) + b'{"text": "Tom\n', "Line 3 of s.jsonl is no JSON"),
    "a line that is a number": ("s.jsonl", b'{"text": "a b"}\n\n5\n', "Line 3 of s.jsonl is neither"),
    "deep JSON": ("s.json", b"[" * 100_000, "is no JSON"),
    "deep JSON line": ("s.jsonl", b"[" * 100_000, "Line 1 of s.jsonl is no JSON"),
    "long number": ("s.json", b"1" * 10_000, "is no JSON"),
    "broken JSON": ("s.json", b'[{"text": "Mia"},\n{"text" "Tom"}]', "line 2 column"),
    "JSON number": ("s.json", b"5", "holds no list"),
    "JSON of nothing": ("s.json", b"[]", "no rows"),
    "a header only": ("s.csv", b"text,prompt\n", "no rows"),
    "open quote": ("s.csv", b'text\n"' + b"Mia found a kite.\n" * 10_000, "quotation mark left open"),
    "pickle": ("s.pkl", pickle.dumps(Bomb()), "is a pickle"),
    "pickle as text": ("s.txt", pickle.dumps(Bomb()), "is a pickle"),
    "pickle as ZIP": ("s.zip", pickle.dumps(Bomb(), protocol=2), "is a pickle"),
    "torch": ("s.pt", torch_file(), "is a pickle"),
    "torch's .bin": ("pytorch_model.bin", torch_file(), "is a pickle"),
    "torch as ZIP": ("s.zip", torch_file(), "data.pkl is a pickle"),
    "NumPy": ("s.npy", b"\x93NUMPY\x01\x00", "is a pickle or array"),
    "NumPy as text": ("s.txt", b"\x93NUMPY\x01\x00", "is a pickle or array"),
    "pickle as text in a ZIP": ("s.zip", zipped({"s.txt": pickle.dumps(Bomb())}), "s.txt is a pickle"),
    "no ZIP": ("s.zip", MIA.encode(), "is no ZIP file"),
    "half a ZIP": ("s.zip", zipped({"s.txt": MIA})[:-30], "is no ZIP file"),
    "damaged ZIP": ("s.zip", zipped({"s.txt": MIA}).replace(b"s.txt", b"t.txt", 1), "damaged"),
    "empty ZIP": ("s.zip", zipped({}), "no file Taleloom can read"),
    "ZIP of pictures": ("s.zip", zipped({"a.png": NOISE, "b.jpg": NOISE}), "no file Taleloom can read"),
    "ZIP of empty files": ("s.zip", zipped({"a.txt": "", "b.csv": ""}), "holds no story"),
    "ZIP in a ZIP": ("s.zip", zipped({"a.txt": MIA, "b.zip": zipped({"c.txt": TOM})}), "another ZIP"),
    "ZIP called text in a ZIP": ("s.zip", zipped({"b.txt": zipped({"c.txt": TOM})}), "is no text"),
    "encrypted ZIP": ("s.zip", encrypted(), "is encrypted"),
    "unusual ZIP": ("s.zip", zipped({"a.txt": MIA}, zipfile.ZIP_LZMA), "packed in an unusual way"),
    "path out of a ZIP": ("s.zip", zipped({"a.txt": MIA, "../../evil.txt": TOM}), "'../../evil.txt', which points"),
    "absolute path": ("s.zip", zipped({"/etc/evil.txt": TOM}), "points outside"),
    "Windows path": ("s.zip", zipped({"..\\evil.txt": TOM}), "points outside"),
    "Windows drive": ("s.zip", zipped({"C:\\evil.txt": TOM}), "points outside"),
    "link in a ZIP": ("s.zip", link(), "points outside"),
    "unsuitable": ("s.txt", b"They drank vodka and were drunk.", "unsuitable for children"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_bad_files_get_a_clear_sentence_and_leave_no_trace(name, content, message, no_traces):
    with pytest.raises(InputError) as caught:
        read_upload(name, content)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_too_large_is_refused_before_anything_is_read(no_traces, monkeypatch):
    for function in ("decode", "check_is_text"):
        monkeypatch.setattr(intake_text, function, None)
    with pytest.raises(InputError, match=r"big\.txt has 51 MB; 50 MB are the most"):
        read_upload("big.txt", bytes(51_000_000))
    with pytest.raises(InputError, match="1,001 bytes; 1,000 bytes"):
        read_paste("\u00e9" * 500 + "x", Limits(max_bytes=1000))


def test_a_huge_file_on_disk_is_refused_by_its_size(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(500_000_000)
    started_s = time.monotonic()
    with pytest.raises(InputError, match=r"huge\.txt has 500 MB"):
        read_file(path)
    assert time.monotonic() - started_s < 0.2
    path.write_text(MIA)
    assert texts(read_file(path)) == [MIA]
    for other in (tmp_path, tmp_path / "missing.txt", Path("/dev/zero")):
        with pytest.raises(InputError, match="is no file"):
            read_file(other)


def test_zip_bombs_are_refused_by_what_they_declare_and_by_what_they_hold(no_traces):
    bomb = zipped({"s.txt": b"Mia " * 10_000_000})  # 40 MB in 40 kB
    limits = Limits(max_unpacked_bytes=1_000_000)
    with pytest.raises(InputError, match="unpacks to 40 MB; 1 MB are the most"):
        read_upload("s.zip", bomb, limits=limits)
    with pytest.raises(InputError, match="damaged"):
        read_upload("s.zip", declared_smaller(bomb, 1000), limits=limits)
    many = zipped({f"{i}.txt": MIA for i in range(30)})
    with pytest.raises(InputError, match="more than 20 files"):
        read_upload("s.zip", many, limits=Limits(max_files=20))
    assert len(read_upload("s.zip", many).rows) == 30


def test_a_zip_unpacks_to_four_times_what_may_come_at_most_and_each_file_to_no_more_than_alone(no_traces):
    limits = Limits(max_bytes=100_000)
    assert limits.max_unpacked_bytes == 400_000 and Limits().max_unpacked_bytes == 200_000_000
    text = (MIA + "\n***\n").encode() * 1_500
    assert len(read_upload("s.zip", zipped({f"{i}.txt": text for i in range(4)}), limits=limits).rows) == 6_000
    with pytest.raises(InputError, match="unpacks to 412,500 bytes; 400,000 bytes are the most"):
        read_upload("s.zip", zipped({f"{i}.txt": text for i in range(5)}), limits=limits)
    with pytest.raises(InputError, match=r"s\.txt in s\.zip has 165,000 bytes; 100,000 bytes are the most for a file"):
        read_upload("s.zip", zipped({"s.txt": text * 2}), limits=limits)
    assert len(read_upload("s.zip", zipped({"a.txt": MIA, "film.mp4": text * 2}), limits=limits).rows) == 1


EMPTY_LISTS = b"[" + b"[]," * 100_000 + b"[]]"  # each takes 64 bytes of memory


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", b'[{"text": "%s"}]' % (b"Mia " * 500_000), "2 MB; 1 MB are the most for a .json file"),
        (
            "s.jsonl",
            b'{"text": "Mia"}\n{"text": "Tom", "x": %s}' % EMPTY_LISTS,
            "Line 2 of s.jsonl has more than 200,000",
        ),
        ("s.csv", b'text\nMia\n"' + b'\n","' * 60_000, "of s.csv has more than 200,000 characters"),
        ("s.csv", b"text,other\n" + b"," * 210_000, "line 2 of s.csv has more than 200,000 characters"),
    ],
    ids=["json", "jsonl", "csv-lines", "csv-line"],
)
def test_what_must_be_parsed_at_once_is_limited_further(no_traces, name, content, message):
    """A thousand times smaller when packed, such a file once took gigabytes."""
    limits = Limits(max_json_bytes=1_000_000, max_row_characters=200_000)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read_upload("s.zip", zipped({name: content}), limits=limits)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content)
    finally:
        tracemalloc.stop()


def test_tables_with_endless_columns_are_refused():
    row = {f"c{i}": "" for i in range(MAX_COLUMNS + 1)}
    for name, content in (("s.jsonl", jsonl([row])), ("s.csv", ",".join(row).encode() + b"\n1")):
        with pytest.raises(InputError, match="more than 1,000 columns"):
            read_upload(name, content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_rows_may_be_many_and_far_apart(end):
    rows = [f'"{i}. {MIA}{end}{end}{TOM}"{end}' for i in range(20)]
    content = f"text{end}{(end * 2_000).join(rows)}".encode()
    intake = read_upload("s.csv", content, limits=Limits(max_row_characters=1_000))
    assert [text.split(".")[0] for text in texts(intake)] == [str(i) for i in range(20)]
    assert all(text.endswith(TOM) for text in texts(intake)) and len(intake.rows) == 20


def test_a_small_parquet_file_cannot_become_a_huge_table(no_traces):
    one = pyarrow.array([MIA + " kite" * 200_000])
    often = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int8()), one)
    content = parquet({"text": often}, store_schema=False)
    assert len(content) < 100_000
    used_before = pyarrow.default_memory_pool().max_memory()
    intake = read_upload("s.parquet", content, limits=Limits(max_unpacked_bytes=3_000_000))
    assert 100 <= len(intake.rows) <= 400
    assert pyarrow.default_memory_pool().max_memory() < used_before + 50_000_000, "256 MB were made of it"
    content = parquet({"text": [MIA + f"{i}" * 1000 for i in range(2_000)]}, use_dictionary=False)
    with pytest.raises(InputError, match="unpacks to"):
        read_upload("s.parquet", content, limits=Limits(max_unpacked_bytes=1_000_000))


def test_other_files_in_a_zip_are_named_and_those_of_the_system_are_not():
    files = {"a.txt": MIA, "x/b.md": TOM, "c.jsonl": jsonl([{"text": OWL, "prompt": "owl"}]), "p.png": NOISE}
    files |= {"__MACOSX/._a.txt": NOISE, ".DS_Store": NOISE, "x/.hidden.txt": NOISE}
    intake = read_upload("s.zip", zipped(files))
    assert texts(intake) == [MIA, TOM, OWL] and intake.prompt_column == "prompt"
    assert intake.warnings[0] == "1 other files of s.zip were left out (p.png)."


def test_unsuitable_stories_are_dropped_and_counted():
    intake = read_upload("s.jsonl", jsonl([{"text": MIA}, {"text": "A gun."}, {"text": TOM, "prompt": "a drunk fox"}]))
    assert texts(intake) == [MIA]
    assert "Stories: 2 left out: words that are unsuitable for children." in intake.warnings


def test_one_story_of_a_megabyte_becomes_parts(tokenizer):
    paragraph = " ".join([MIA, TOM, OWL])
    text = "\n\n".join(f"{i}. {paragraph}" for i in range(1_000_000 // len(paragraph)))
    for intake in (read_upload("s.txt", text.encode()), read_upload("s.jsonl", jsonl([{"text": text}]))):
        assert "\n".join(texts(intake)) == text.replace("\n\n", "\n")
        assert all(len(part) <= 10_000 for part in texts(intake))
        assert any("longer than 100,000 characters: 1" in w for w in intake.warnings)
        assert sum(row["split"] == "test" for row in intake.rows) == round(len(intake.rows) / 10)
    assert any("read as one story of" in w for w in read_upload("s.txt", text.encode()).warnings)
    words = read_upload("s.txt", b"a" * 1_000_000)
    assert sum(map(len, texts(words))) == 1_000_000


@pytest.mark.parametrize(
    "unit", ["to be continued\n", "<!--", "![", "*a", "\n ", "# a\n", " \u2014", "a\n***\n", "- - x"]
)
def test_text_made_to_take_long_takes_no_longer(unit):
    """No repetition may look at, or copy, all that follow: unclosed comments once did, and a megabyte took minutes."""
    times_s = []
    for n in (30_000, 300_000):
        started_s = time.process_time()
        with contextlib.suppress(InputError):
            read_upload("s.md", (unit * (n // len(unit))).encode())
        times_s.append(time.process_time() - started_s)
    assert times_s[1] < 40 * times_s[0] + 0.5


def test_ten_thousand_stories_of_one_word(tokenizer):
    intake = read_upload("s.jsonl", jsonl([{"text": f"word{i}"} for i in range(10_000)]))
    found = check(intake, tokenizer, context=64)
    assert found.n_stories == 10_000 and found.n_test == 50
    assert any("too short" in w for w in found.warnings)


def test_more_stories_than_are_taken():
    limits = Limits(max_stories=10)
    content = jsonl([{"text": f"{i}. {MIA}"} for i in range(25)])
    for name, data in (("s.jsonl", content), ("s.zip", zipped({"a.jsonl": content, "b.jsonl": content}))):
        intake = read_upload(name, data, limits=limits)
        assert texts(intake) == [f"{i}. {MIA}" for i in range(10)]
        assert "Only the first 10 stories were taken; more are not used at once." in intake.warnings
    exactly = read_upload("s.jsonl", content, limits=Limits(max_stories=25))
    assert len(exactly.rows) == 25 and exactly.warnings == []


def test_names_are_shown_harmlessly():
    with pytest.raises(InputError) as caught:
        read_upload("../[x](http://evil)\n**" + "y" * 500 + ".txt", b"\0")
    assert len(str(caught.value)) < 200 and not set("[]*\n") & set(str(caught.value))


NAMES = [f"s{ending}" for ending in (*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".zip", ".doc")]


@given(name=st.sampled_from(NAMES), content=st.binary(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_stories_or_an_input_error(name, content):
    try:
        intake = read_upload(name, content)
    except InputError:
        return
    assert intake.rows and all(row["text"].strip() for row in intake.rows)


@given(where=st.integers(0, 10_000), to=st.integers(0, 255), kind=st.sampled_from(["zip", "parquet"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_changed_byte_is_survived(where, to, kind):
    content = bytearray(zipped({"a.txt": MIA, "b.txt": TOM}) if kind == "zip" else parquet({"text": [MIA, TOM]}))
    content[where % len(content)] = to
    with contextlib.suppress(InputError):
        assert len(read_upload(f"s.{kind}", bytes(content)).rows) <= 2


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stories_are_always_clean(parts):
    try:
        intake = read_upload("s.jsonl", jsonl([{"text": part} for part in parts]))
    except InputError:
        return
    for row in intake.rows:
        assert row["text"] == row["text"].strip() and "\r" not in row["text"] and "\n\n" not in row["text"]
        assert not intake_text.CONTROL.search(row["text"])
    assert {row["text"]: row["split"] for row in intake.rows} == {r["text"]: r["split"] for r in reversed(intake.rows)}


@given(st.text("ab .\n", max_size=400), st.integers(1, 50))
@settings(derandomize=True)
def test_cutting_loses_nothing_but_space(text, n):
    parts = intake_text.cut(text, n)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= n for part in parts)


# The Hub and the sample.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for pull_dataset: data sets as folders of files."""

    def push(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)

        def pull(repo, progress, use_token, max_bytes, split):
            names = sorted(files)
            return [tmp_path / name for name in (names if split == "train" else choose_split_files(names, split))]

        monkeypatch.setattr("model.hub.pull.pull_dataset", pull)

    return push


def test_a_data_set_of_the_hub(hub):
    rows = [{"story": f"{i}. {MIA}", "idea": "a kite", "n": i} for i in range(300)]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    hub({"data/train-0.parquet": parquet(table), "data/train-1.parquet": parquet(table)})
    said = []
    intake = read_dataset("someone/kites", progress=said.append, limits=Limits(max_stories=250))
    assert texts(intake) == [row["story"] for row in rows[:250]]
    assert (intake.name, intake.text_column, intake.prompt_column) == ("someone/kites", "story", "idea")
    assert intake.columns == ["story", "idea"] and "n" not in intake.columns
    assert said == ["Reading train-0.parquet ..."]
    with pytest.raises(InputError, match=r"no column 'body'\. Choose one of these: story, idea"):
        read_dataset("someone/kites", text_column="body")


def test_the_split_of_a_data_set_picks_its_files(hub):
    hub({"data/happy.jsonl": jsonl([{"text": MIA}]), "data/sad.txt": f"{TOM}\n<|endoftext|>\n{OWL}".encode()})
    assert sorted(texts(read_dataset("someone/moods"))) == sorted([MIA, TOM, OWL])
    assert texts(read_dataset("someone/moods", split="sad")) == [TOM, OWL]
    with pytest.raises(InputError, match=r"no file for the split 'test'\. Its files: data/happy"):
        read_dataset("someone/moods", split="test")
    hub({"data/test-0.jsonl": jsonl([{"text": OWL}]), "data/train-0.jsonl": jsonl([{"text": MIA}])})
    assert texts(read_dataset("someone/moods", split="test")) == [OWL]


def test_of_a_large_file_of_a_data_set_the_beginning_is_read(hub):
    rows = [{"text": f"{i:03}. {MIA}"} for i in range(100)]
    hub({"data/train.jsonl": jsonl(rows)})
    intake = read_dataset("someone/kites", limits=Limits(max_bytes=2_000))
    assert texts(intake) == [row["text"] for row in rows[: len(intake.rows)]] and 20 < len(intake.rows) < 40
    assert intake.warnings[0].startswith("Of train.jsonl the first 1,9")


def test_the_sample_comes_ready_to_learn_from(bundled):
    intake = read_sample()
    assert [row["split"] for row in intake.rows].count("train") == 34
    assert [row["split"] for row in intake.rows].count("test") == 10
    assert all(row["prompt"] for row in intake.rows) and intake.warnings == []
    found = check(intake, Tokenizer.load(bundled), context=read_config(bundled).max_position_embeddings)
    assert found.warnings == [] and found.looks_english and found.n_too_long == 0
    quick = estimate(found, FINE_TUNE_PRESETS["quick"], 2_000, 8_300_000)
    assert 10 < quick.seconds < 180 and 400 < quick.memory_mb < 2_000


# Check and estimate.


def test_check_counts_what_training_will_see(tokenizer, stories):
    rows = [{"text": text, "prompt": "a fox" if i % 2 else None} for i, text in enumerate(stories[:60])]
    rows += [{"text": "\n".join(stories[60:75])}, {"text": stories[0]}]
    intake = read_upload("s.jsonl", jsonl(rows))
    found = check(intake, tokenizer, context=64)
    lengths = [len(tokenizer.encode(row["text"])) for row in intake.rows]
    train = [row for row in intake.rows if row["split"] == "train"]
    assert (found.n_stories, found.n_train, found.n_test) == (62, len(train), 62 - len(train))
    assert found.n_tokens == sum(len(tokenizer.encode(row["text"])) for row in train)
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert sorted(lengths)[30] - 1 <= found.median <= sorted(lengths)[31]
    assert found.duplicates == 1 and any("more than once" in w for w in found.warnings)
    assert found.n_too_long == sum(length > 63 for length in lengths) >= 1
    assert any("sees at once" in w for w in found.warnings)
    pieces = [piece for row in train for piece in token_pieces(row["text"], row["prompt"], tokenizer, 65)]
    assert found.n_rows == len(list(pack(pieces, 65, tokenizer.pad_id)))
    assert found.unknown_share == 0 and found.contamination is None


def test_unknown_characters_and_other_languages_are_told(tokenizer):
    greek = read_paste(
        "\u0397 \u03b1\u03bb\u03b5\u03c0\u03bf\u03cd \u03c0\u03ae\u03b3\u03b5 \u03c3\u03c0\u03af\u03c4\u03b9. " * 20
    )
    found = check(greek, tokenizer)
    assert found.unknown_share > 0.7 and not found.looks_english
    assert any("does not know" in w for w in found.warnings) and any("English" in w for w in found.warnings)
    for text in (
        "Der kleine Fuchs ging in den Garten und fand dort einen roten Ball. Er war sehr froh. " * 5,
        "Le petit renard alla dans le jardin et il y trouva un ballon rouge. On a ri, puis il a dormi. " * 5,
        "El zorro fue al jardin y encontro una pelota roja en la hierba, y a la noche la llevo a casa. " * 5,
    ):
        assert not check(read_paste(text), tokenizer).looks_english
    assert check(read_paste("Hello, fox!"), tokenizer).looks_english, "too short to tell"


def test_stories_by_which_forgetting_is_measured_are_found_in_the_readers(tokenizer, stories):
    own = [f"{text}\n{MIA} {TOM} {OWL} {text}" for text in stories[:10]]
    intake = read_upload("s.jsonl", jsonl([{"text": text, "split": "train"} for text in own]))
    held_out = [intake.rows[i]["text"] for i in range(10) if intake.rows[i]["split"] == "train"][:3]
    found = check(intake, tokenizer, [*held_out, "Something else altogether, about nothing you know of."])
    assert found.contamination["exact"] == 3 and found.contamination["stories"] == 4
    assert any(w.startswith("3 of the 4 stories by which forgetting is measured") for w in found.warnings)
    assert not check(intake, tokenizer, ["Quite another tale of nine words, or so."]).contamination["exact"]


def test_held_out_stories_much_like_those_trained_on_are_told(tokenizer, stories):
    long = " ".join(stories[:5])
    rows = [{"text": long + " The end came.", "split": "test"}, {"text": long, "split": "train"}]
    found = check(read_upload("s.jsonl", jsonl(rows)), tokenizer)
    assert found.n_leaked == 1 and any("nearly the same" in w for w in found.warnings)


def test_more_tokens_than_allowed(tokenizer):
    intake = read_paste(MIA)
    n = len(tokenizer.encode(MIA))
    assert check(intake, tokenizer, limits=Limits(max_tokens=n)).n_tokens == n
    with pytest.raises(InputError, match=f"{n:,} tokens; {n - 1:,} are the most"):
        check(intake, tokenizer, limits=Limits(max_tokens=n - 1))


def test_estimate_follows_its_formulae(tokenizer, stories):
    found = check(read_upload("s.jsonl", jsonl([{"text": text} for text in stories])), tokenizer, context=64)
    plain = FineTuneSettings(epochs=3, rows_per_step=4, rows_per_pass=4, replay_share=0.0, evaluations=1)
    first = estimate(found, plain, 1000, 1_000_000)
    assert first.n_steps == -(-3 * found.n_rows // 4)
    read = first.n_steps * 4 * 65
    assert read / 1000 < first.seconds < 2 * read / 1000
    assert estimate(found, plain, 2000, 1_000_000).seconds == pytest.approx(first.seconds / 2)
    half = FineTuneSettings(epochs=3, rows_per_step=4, replay_share=0.5)
    assert estimate(found, half, 1000, 1_000_000).n_steps == -(-3 * found.n_rows // 2)
    assert estimate(found, FineTuneSettings(epochs=3, max_steps=7), 1000, 1_000_000).n_steps == 7
    fewer = FineTuneSettings(epochs=3, rows_per_step=4, rows_per_pass=1)
    lora = FineTuneSettings(epochs=3, method="lora")
    for less in (fewer, lora):
        assert estimate(found, less, 1000, 1_000_000).memory_mb < first.memory_mb
    assert estimate(found, lora, 1000, 1_000_000).checkpoint_mb == pytest.approx(5 + 2 + 2)
    assert first.checkpoint_mb == pytest.approx(9 + 2 + 2)  # MB for a million weights: checkpoint, best, base's copy


def test_intake_loads_no_torch():
    code = (
        "import sys; from model.intake import read_sample, check; from model.tokenizer import Tokenizer;"
        "from model.config import BUNDLED_WEIGHTS; check(read_sample(), Tokenizer.load(BUNDLED_WEIGHTS));"
        "print('torch' in sys.modules, 'streamlit' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert done.stdout.split() == ["False", "False", "False"], done.stderr
