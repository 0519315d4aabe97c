"""An evaluation as a Markdown table for the model card, and as one plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

# Measure: what the table calls it, and its format.
ROWS = {
    "stories": ("stories", ",d"),
    "ended": ("ended by themselves within the limit", ".1%"),
    "median_words": ("median words", ".0f"),
    "character_kept": ("character kept (two sentences, one in the last third)", ".1%"),
    "thing_kept": ("thing kept, the same", ".1%"),
    "both_kept": ("both kept", ".1%"),
    "words_used": ("of characters and things, named at all", ".1%"),
    "repeated_sentences": ("repeated sentences", ".2%"),
    "distinct_1": ("distinct-1", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "distinct_3": ("distinct-3", ".3f"),
    "self_bleu": ("self-BLEU (100 stories)", ".1f"),
    "copied_8grams": ("8-grams found in the training text", ".1%"),
    "copied_13grams": ("13-grams found in the training text", ".2%"),
    "longest_run_median": ("longest copied run, median words", ".0f"),
    "longest_run_most": ("longest copied run of all, words", ".0f"),
    "names_per_story": ("names a story", ".2f"),
    "names_lost": ("names of the first half lost in the second", ".1%"),
    "names_late": ("names first met in the last quarter", ".1%"),
    "name_given_twice": ("stories that give one name twice", ".1%"),
    "reading_grade": ("reading level (Flesch-Kincaid grade)", ".1f"),
    "bleu": ("BLEU against the real continuation", ".2f"),
    "bleu_chance": ("BLEU against another story's", ".2f"),
    "chrf": ("chrF against the real continuation", ".1f"),
    "chrf_chance": ("chrF against another story's", ".1f"),
}
COLUMNS = {
    "ideas": "from ideas, best draft",
    "first_drafts": "first draft",
    "continuations": "from openings",
    "real": "real stories",
}
DETECTED = {
    "generated": "this storyteller",
    "control_real": "control: other real stories",
    "control_shuffled": "control: real sentences, shuffled",
    "control_hot": "control: this storyteller at temperature 2",
}
SHARES = (0, 1.1)  # an axis with room for the figures


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of all that was measured; what was not is left out."""
    parts = []
    if sources := results.get("sources"):
        rows = [
            [name, f"{s['stories']:,}", f"{s['bits_per_byte']:.4f}", f"{s['perplexity']:.2f}"]
            for name, s in sources.items()
        ]
        parts.append(_table(["text", "stories", "bits per byte", "perplexity per token"], rows))
    if found := results.get("cloze"):
        rows = [[topic.replace("_", " "), f"{accuracy:.1%}"] for topic, accuracy in found["topics"].items()]
        rows.append([f"all {found['pairs']} pairs", f"{found['accuracy']:.1%} ± {found['standard_error']:.1%}"])
        parts.append(_table(["cloze", "right"], rows))
    columns = {column: results[column] for column in COLUMNS if column in results}
    if columns:
        rows = [
            [label, *(format(of[name], form) if name in of else "" for of in columns.values())]
            for name, (label, form) in ROWS.items()
            if any(name in of for of in columns.values())
        ]
        parts.append(_table(["stories", *(COLUMNS[column] for column in columns)], rows))
    if realism := results.get("realism"):
        rows = [
            [
                label,
                f"{realism[name]['stories']:,}",
                f"{realism[name]['accuracy']:.3f} ± {realism[name]['deviation']:.3f}",
            ]
            for name, label in DETECTED.items()
        ]
        parts.append(_table(["told from real stories (0.5: it cannot)", "of each", "accuracy"], rows))
    return "\n".join(parts)


def plot(results: Mapping[str, Any]) -> bytes:
    """A PNG: bits per byte, cloze by topic, how stories keep to ideas and to themselves, and realism; what there is."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, dict[str, float], dict[str, float], tuple[float, float], float | None]] = []
    if sources := results.get("sources"):
        bits = {name: scores["bits_per_byte"] for name, scores in sources.items()}
        panels.append(("Bits per byte (lower is better)", bits, {}, (0, 1.15 * max(bits.values())), None))
    if found := results.get("cloze"):
        topics = {topic.replace("_", " "): accuracy for topic, accuracy in found["topics"].items()}
        panels.append(("Cloze: right of pairs (chance 0.5)", {**topics, "all": found["accuracy"]}, {}, SHARES, 0.5))
    if ideas := results.get("ideas"):
        names = ("ended", "character_kept", "thing_kept", "both_kept", "words_used", "copied_8grams", "names_lost")
        shares = {name.replace("_", " "): ideas[name] for name in names if name in ideas}
        panels.append(("Stories from ideas: shares", shares, {}, SHARES, None))
    if realism := results.get("realism"):
        accuracy = {label: realism[name]["accuracy"] for name, label in DETECTED.items()}
        deviation = {label: realism[name]["deviation"] for name, label in DETECTED.items()}
        panels.append(("Told from real stories (0.5: cannot be)", accuracy, deviation, SHARES, 0.5))
    figure = Figure(figsize=(9, 0.6 + sum(0.7 + 0.28 * len(values) for _, values, *_ in panels)), layout="constrained")
    heights = [1.5 + len(values) for _, values, *_ in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, values, errors, limits, chance) in zip(axes, panels, strict=True):
        labels = list(values)
        ax.barh(labels, list(values.values()), xerr=[errors.get(label, 0) for label in labels], color="#4c78a8")
        for i, value in enumerate(values.values()):
            ax.annotate(
                f"{value:.3f}", (value + errors.get(labels[i], 0), i), (4, 0), textcoords="offset points", va="center"
            )
        if chance is not None:
            ax.axvline(chance, color="black", linestyle="--", linewidth=1)
        ax.set_xlim(*limits)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
