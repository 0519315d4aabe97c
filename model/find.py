"""Which model folder and which device a name means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from model.config import BUNDLED_WEIGHTS, user_home
from model.errors import InputError, ModelError

CUDA_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "C:/Windows/System32/nvcuda.dll")


def say_nothing(_: str) -> None:
    pass


def choose_device(device: str = "auto") -> str:
    """Resolve to "cpu" or "cuda"; "auto" takes CUDA where torch finds it.

    Torch, which takes a second to import, is asked only when there is a driver or CUDA is wanted.

    Raises:
        InputError: CUDA is asked for and there is none, or the name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"Device {device!r} is none of auto, cpu, cuda.")
    if device == "cpu" or (device == "auto" and not any(Path(driver).exists() for driver in CUDA_DRIVERS)):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("There is no CUDA device here (or torch is a CPU build). Use --device cpu.")
    return "cpu"


def find_model(model: str | None, progress: Callable[[str], None] = say_nothing, folders: bool = True) -> Path:
    """The folder of a model: None is the bundled one; else a folder, a name of the user's own, or REPO[@revision].

    Args:
        folders: whether a path counts. A web page says no: its visitors must not look around this machine's disk.

    Raises:
        ModelError: there is no such model; the message says where was looked.
    """
    if not model:
        return BUNDLED_WEIGHTS
    own = user_home() / "models" / model
    try:
        if folders and Path(model).expanduser().is_dir():
            return Path(model).expanduser()
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*", model) and own.is_dir():
            return own
    except OSError as error:  # longer than any name
        raise ModelError(f"There is no model {model[:40]!r}: {error.strerror}.") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?", model) and not model.startswith((".", "/")):
        from model.hub.pull import pull_model

        return pull_model(model, progress, use_token=folders)
    if not folders:
        raise ModelError(f"There is no model {model!r}. Type a Hub id (owner/name) or the name of a model of your own.")
    raise ModelError(
        f"There is no model {model!r}: no such folder, none of your own in {own.parent}, no Hub id (owner/name)."
    )
