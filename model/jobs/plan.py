"""Before anything starts: what a reader's stories look like to a storyteller, and what learning them will take."""

from __future__ import annotations

import contextlib
import statistics
from functools import cache
from pathlib import Path

from model.checkpoint import load_tokenizer, read_config
from model.config import FineTuneSettings, user_home
from model.errors import InputError
from model.find import find_model
from model.intake import Check, Estimate, Intake, check, estimate
from model.jobs.record import read_lines, read_request
from model.jobs.task import read_originals

# Tokens a second of a fine-tune of so many weights on two shared CPU cores, where nothing was measured yet.
TYPICAL_SPEED, TYPICAL_PARAMETERS = 2_300, 8.3e6
MIN_MEASURED, N_MEASURED = 5, 50  # steps


def plan(
    intake: Intake,
    settings: FineTuneSettings,
    base: str | None = None,
    root: Path | None = None,
    folders: bool = False,
) -> tuple[Check, Estimate]:
    """Look the stories over with the base's tokenizer, and estimate time and memory on this machine.

    Args:
        base: a model's name, None for the bundled one.
        root: the folder of the jobs, for the speed that was measured here.
        folders: whether the base may be a folder; see find_model.

    Raises:
        ModelError: the base cannot be found.
    """
    folder = find_model(base, folders=folders)
    config = read_config(folder)
    context = config.max_position_embeddings
    looked_over = check(intake, load_tokenizer(folder, config), held_out_originals(), context=context)
    speed = measured_speed(base, root) or TYPICAL_SPEED * TYPICAL_PARAMETERS / config.n_parameters
    return looked_over, estimate(looked_over, settings, speed, config.n_parameters)


@cache
def held_out_originals() -> tuple[str, ...]:
    """Stories that the bundled storyteller was not trained on. Kept: all the others are read for them."""
    return tuple(row["text"] for row in read_originals() if row["split"] == "test")


def measured_speed(base: str | None = None, root: Path | None = None) -> float | None:
    """Median tokens a second of the latest fine-tune from `base` on this machine; None when there was none."""
    root = root or user_home() / "jobs"
    for folder in sorted(root.glob("*/"), reverse=True):
        with contextlib.suppress(InputError):  # damaged
            if read_request(folder).base == base:
                speeds = [m.get("tokens_per_second") for m in read_lines(folder / "metrics.jsonl")]
                if len(measured := [speed for speed in speeds if speed]) >= MIN_MEASURED:
                    return statistics.median(measured[-N_MEASURED:])
    return None
