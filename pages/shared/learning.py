"""The settings of a fine-tune, as two pages ask for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from model.config import LORA_TARGETS, FineTuneSettings
from model.errors import TaleloomError
from pages.shared.parts import literally, manager

METHODS = {"full": "All weights", "lora": "LoRA additions"}
SCHEDULES = {"linear": "Falls in a line", "cosine": "Falls as a cosine", "constant": "Stays"}


def choose_settings(settings: FineTuneSettings, key: str) -> FineTuneSettings | None:
    """Fields to change `settings` in; None, with a sentence on the page, when they cannot be used so.

    Args:
        key: of these settings, so that others do not show what was typed for them.
    """
    values: dict[str, Any] = {}
    limits = manager().limits

    def number(column: Any, name: str, label: str, low: float, high: float, **more: Any) -> None:
        most = getattr(limits, f"max_{name}", None)
        high = high if most is None else max(low, min(high, most))
        value = min(high, type(low)(getattr(settings, name)))  # Streamlit mixes no whole numbers with others
        values[name] = column.number_input(label, low, high, value, key=f"{key}_{name}", **more)

    def choice(column: Any, name: str, label: str, options: dict[str, str]) -> None:
        index = list(options).index(getattr(settings, name))
        values[name] = column.selectbox(
            label, list(options), index, format_func=options.__getitem__, key=f"{key}_{name}"
        )

    left, right = st.columns(2)
    choice(left, "method", "What learns", METHODS)
    choice(right, "schedule", "Learning rate's course", SCHEDULES)
    number(left, "learning_rate", "Learning rate", 0.000001, 0.1, step=0.0001, format="%.6f")
    number(right, "epochs", "Epochs at most", 0.1, 1000.0, step=1.0)
    highest = max(1, limits.max_job_steps or 10_000_000)
    values["max_steps"] = left.number_input(
        "Steps at most", 1, highest, min(settings.max_steps or highest, highest), key=f"{key}_max_steps"
    )
    number(right, "seed", "Seed", 0, 2**31 - 1)
    number(left, "rows_per_step", "Rows per step", 1, 256, help="Of as many tokens each as it has context.")
    number(right, "rows_per_pass", "Rows per pass", 1, 256, help="In memory at once: fewer take longer, and less.")
    number(
        left, "replay_share", "Replay share", 0.0, 0.9, step=0.05,
        help="Old stories read along against forgetting.",
    )  # fmt: skip
    number(right, "dropout", "Dropout", 0.0, 0.9, step=0.05)
    number(left, "weight_decay", "Weight decay", 0.0, 10.0, step=0.05)
    number(right, "frozen_layers", "Frozen layers", 0, 1000, help="The lowest ones stay as they are.")
    number(left, "evaluations", "Evaluations", 1, 200)
    number(right, "patience", "Patience", 0, 200, help="Evaluations without gain before it ends; 0 never ends it.")
    if values["method"] == "lora":
        number(left, "lora_rank", "LoRA rank", 0, 256)
        number(right, "lora_alpha", "LoRA alpha", 0.0, 1024.0, step=1.0)
        targets = st.multiselect("LoRA targets", LORA_TARGETS, settings.lora_targets, key=f"{key}_lora_targets")
        values["lora_targets"] = tuple(targets)
    try:
        return replace(settings, **values)
    except TaleloomError as error:
        st.error(literally(str(error)))
        return None
