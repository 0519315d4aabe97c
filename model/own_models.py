"""Storytellers of the user's own, in the folder `models` of the user's Taleloom folder: list, rename, export, delete.

Plain files, no torch. What was noted about one stands in its taleloom.json.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.checkpoint import write_atomically, write_folder
from model.config import user_home
from model.errors import InputError, ModelError

NOTES = "taleloom.json"
ADAPTER = "adapter_model.safetensors"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,59}")
ExportForm = Literal["folder", "gguf", "adapter"]


@dataclass(frozen=True)
class OwnModel:
    """One storyteller: `created` in Unix seconds, `base` what it was fine-tuned from (None: the bundled one), `visitor`
    the key of whoever made it on a public site (see jobs.admission.visitor_key), "" when nobody in particular did."""

    name: str
    folder: Path
    created: float
    base: str | None = None
    note: str = ""
    job: str | None = None
    visitor: str = ""

    @property
    def size_mb(self) -> float:
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file()) / 1e6

    @property
    def card(self) -> str:
        """Its model card, Markdown; empty when it has none."""
        path = self.folder / "README.md"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def has_adapter(self) -> bool:
        return (self.folder / ADAPTER).is_file()


def models_folder() -> Path:
    return user_home() / "models"


def check_name(name: str) -> str:
    """The name, stripped; raises InputError when no storyteller could be called so."""
    name = name.strip()
    if not NAME.fullmatch(name) or name.endswith("."):
        raise InputError(
            f"{name!r} cannot be a storyteller's name. Use letters, digits, dots, dashes and underscores, 60 at most, "
            "beginning with a letter or a digit."
        )
    return name


def _notes(folder: Path) -> dict[str, Any]:
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def own_models() -> list[OwnModel]:
    """All of them, newest first."""
    folder = models_folder()
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and (path / "config.json").is_file():
            notes = _notes(path)
            created = notes.get("created")
            found.append(
                OwnModel(
                    path.name,
                    path,
                    float(created) if isinstance(created, (int, float)) else path.stat().st_mtime,
                    notes.get("base"),
                    str(notes.get("note") or ""),
                    notes.get("job"),
                    str(notes.get("visitor") or ""),
                )
            )
    return sorted(found, key=lambda model: (-model.created, model.name))


def own_model(name: str) -> OwnModel:
    """Raises ModelError when there is none of that name."""
    for model in own_models():
        if model.name == name:
            return model
    raise ModelError(f"There is no storyteller of your own called {name!r}.")


def add_model(name: str, source: Path, notes: Mapping[str, Any], card: str) -> OwnModel:
    """Take the model in the folder `source` in under `name`; it appears complete or not at all.

    Raises:
        InputError: the name is taken or cannot be one.
    """
    folder = models_folder() / check_name(name)
    if folder.exists():
        raise InputError(f"There is a storyteller called {name!r} already. Choose another name.")
    # A write that was killed leaves a hidden file behind.
    kept = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in kept}
    write_folder(folder, {**files, "README.md": card, NOTES: json.dumps(dict(notes), indent=2)})
    return own_model(name)


def rename_model(name: str, new: str) -> None:
    """Raises InputError when the new name is taken or cannot be one."""
    model, new = own_model(name), check_name(new)
    if new == name:
        return
    target = model.folder.with_name(new)
    if target.exists():
        raise InputError(f"There is a storyteller called {new!r} already. Choose another name.")
    os.rename(model.folder, target)


def note_model(name: str, note: str) -> None:
    """Keep a line about it."""
    model = own_model(name)
    write_atomically(model.folder / NOTES, json.dumps({**_notes(model.folder), "note": note.strip()}, indent=2))


def delete_model(name: str) -> None:
    """Delete it for good; a story that it is telling goes on, for its weights are in memory."""
    model = own_model(name)
    doomed = model.folder.with_name(f".{uuid.uuid4().hex}")  # gone at once, whatever happens to the rest
    os.rename(model.folder, doomed)
    shutil.rmtree(doomed)


def export_model(name: str, form: ExportForm) -> tuple[str, bytes]:
    """(file name, content): the whole folder as a ZIP, a GGUF file for llama.cpp, or LoRA's additions
    as the `peft` library reads them, in a ZIP.

    Raises:
        ModelError: there is no such storyteller, or it has no adapter.
    """
    model = own_model(name)
    if form == "gguf":
        from model.hub.export import export_gguf

        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / f"{name}.gguf"
            export_gguf(model.folder, out)
            return out.name, out.read_bytes()
    paths = sorted(path for path in model.folder.iterdir() if path.is_file())
    if form == "adapter":
        if not model.has_adapter:
            raise ModelError(f"{name} was not trained with LoRA, so it has no adapter. Export the folder.")
        paths = [path for path in paths if path.name.startswith("adapter_")]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # weights do not get smaller
        for path in paths:
            archive.write(path, f"{name}/{path.name}")
    return f"{name}{'-adapter' if form == 'adapter' else ''}.zip", content.getvalue()
