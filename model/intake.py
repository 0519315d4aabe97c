"""Readers' own stories: from an upload, pasted text, a Hub data set or the bundled sample to rows for a fine-tune.

What comes in is judged as if by a stranger: sizes are checked before anything is parsed, nothing is written to disk and
nothing that could run code is opened. Knows nothing of torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from model.errors import InputError
from model.intake_check import Check, Estimate, check, estimate
from model.intake_formats import (
    DEFAULT_LIMITS,
    READABLE,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Limits,
    read_zip,
    refuse_code,
    shown,
    size,
    suffix,
)
from model.intake_rows import Gathering, Intake, StoryRow
from model.intake_text import check_is_text

__all__ = [
    "Check",
    "Estimate",
    "Intake",
    "Limits",
    "StoryRow",
    "check",
    "estimate",
    "read_dataset",
    "read_file",
    "read_paste",
    "read_sample",
    "read_upload",
]

SAMPLE = Path(__file__).parent / "training" / "pirate-log.jsonl"  # a captain's log, written for this project


def read_upload(
    name: str,
    content: bytes,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Intake:
    """Read a file by its name's ending: TXT, MD, JSONL, JSON, CSV, TSV, PARQUET or a ZIP of these.

    Args:
        text_column, prompt_column: of a table; None finds them by name, prompt_column "" is none.

    Raises:
        InputError: it is empty, too large, damaged, no text, a pickle, lacks a column, or holds no usable story.
    """
    label, kind = shown(name), suffix(name)
    if len(content) > limits.max_bytes:
        raise _too_large(label, len(content), limits)
    refuse_code(name, content[:16])
    gathering = Gathering(label, limits, text_column, prompt_column)
    if not content:
        raise InputError(f"{label} is empty. Give a file with stories in it.")
    if kind == ".zip":
        members, warnings = read_zip(label, content, limits)
        gathering.warnings += warnings
        for member, inside in members:
            if gathering.is_full:
                gathering.counts["over"] += 1
                break
            if inside.strip():
                gathering.add_file(member, inside)
    elif kind in TEXT_SUFFIXES + TABLE_SUFFIXES:
        gathering.add_file(name, content)
    else:
        raise InputError(f"{label} is of a kind Taleloom cannot read. Give {READABLE}.")
    return gathering.intake()


def read_file(
    path: Path,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Intake:
    """As `read_upload`, from a file on this computer; its size is checked before it is read."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is no file. Give {READABLE}.")
        if (n_bytes := path.stat().st_size) > limits.max_bytes:
            raise _too_large(shown(path.name), n_bytes, limits)
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check its name and who may read it.") from error
    return read_upload(path.name, content, text_column=text_column, prompt_column=prompt_column, limits=limits)


def read_paste(text: str, limits: Limits = DEFAULT_LIMITS) -> Intake:
    """Read pasted text, one story or several with borders between them; raises InputError as `read_upload`."""
    name = "The pasted text"
    if (n_bytes := len(text.encode(errors="replace"))) > limits.max_bytes:
        raise _too_large(name, n_bytes, limits)
    if not text.strip():
        raise InputError("There is no text yet. Paste at least one story.")
    check_is_text(name, text)
    gathering = Gathering(name, limits)
    gathering.add_text(text)
    return gathering.intake()


def read_dataset(
    repo: str,
    split: str = "train",
    text_column: str | None = None,
    prompt_column: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
    limits: Limits = DEFAULT_LIMITS,
    for_stranger: bool = False,
) -> Intake:
    """Read the first stories (`limits`) of the Hub's data set `repo` (owner/name or owner/name@revision).

    `split` picks the files with this word in their path; files without any split in their names are "train". Of each
    file that is not Parquet only the first `limits.max_bytes` are read. For a stranger, on a public site, this
    computer's token is not used, and no more is fetched than `limits` let upload.

    Raises:
        InputError: it cannot be pulled (see `model.hub.pull.pull_dataset`), or read (see `read_upload`).
    """
    from model.hub.pull import has_word, pull_dataset

    split = split.strip() or "train"
    paths = pull_dataset(repo, progress, not for_stranger, limits.max_bytes if for_stranger else None, split)
    chosen = paths
    if split == "train":
        chosen = [path for path in paths if has_word("/".join(path.parts[-2:]), split)] or paths
    gathering = Gathering(repo, limits, text_column, prompt_column)
    for path in chosen:
        if gathering.is_full:
            gathering.counts["over"] += 1
            break
        progress(f"Reading {path.name} ...")
        try:
            if path.suffix == ".parquet":
                gathering.add_file(path.name, path)
            else:
                with path.open("rb") as file:
                    content = file.read(limits.max_bytes)
                    if file.read(1):  # a part will do; its last line is cut
                        content = content[: content.rfind(b"\n") + 1] or content
                        gathering.warnings.append(f"Of {path.name} the first {size(len(content))} were read.")
                if content.strip():
                    gathering.add_file(path.name, content)
        except OSError as error:
            raise InputError(f"{path.name} of {repo} cannot be read: {error.strerror}. Try again.") from error
    return gathering.intake()


def read_sample() -> Intake:
    """The sample that comes with Taleloom: 44 pages of a pirate captain's log, 10 of them held out."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    gathering = Gathering("Pirate log", DEFAULT_LIMITS)
    for row in rows:
        gathering.add(row["text"], row["prompt"], row["split"])
    return gathering.intake()


def _too_large(name: str, n_bytes: int, limits: Limits) -> InputError:
    return InputError(f"{name} has {size(n_bytes)}; {size(limits.max_bytes)} are the most. Give a part of it.")
