"""Teach a storyteller your own stories: bring them, say how long, start; and all fine-tunes so far.

A fine-tune is a process of its own with a folder on disk (model/jobs); how it goes is shown by job.py.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import altair as alt
import streamlit as st

from model.config import FINE_TUNE_PRESETS, FineTuneSettings
from model.errors import TaleloomError
from model.intake import Check, Intake, Limits, read_dataset, read_paste, read_sample, read_upload
from model.jobs.plan import plan
from model.jobs.record import Job, JobState
from model.own_models import own_models
from pages.shared.learning import choose_settings
from pages.shared.parts import (
    BADGES,
    asker,
    is_mine,
    is_ones_own_machine,
    literally,
    manager,
    show_polled,
    signed_in,
    visible_models,
)

SAMPLE, FILE, PASTE, HUB = "Sample: a captain's log", "A file", "Paste", "Hugging Face Hub"
PRESETS = {"quick": "Quick taste", "good": "Good", "thorough": "Thorough"}
PRESET_HELP = "Up to about 3, 25 or 140 minutes on two CPU cores; few stories take much less."
TEST_IDEAS = "a dragon who is afraid of fire\na lost kitten\ntwo mice build a boat"
SHOWN_UNKNOWN_SHARE = 0.001
FILE_TYPES = ["txt", "md", "jsonl", "json", "csv", "tsv", "parquet", "zip"]
POLL_S = 2.0


# Your stories.


@dataclass
class Reading:
    """What came of reading stories: kept for the session, so that a rerun does not read them again."""

    source: tuple[str, ...]  # where from
    columns: tuple[str | None, str | None]  # asked for, of a table: of stories, of ideas
    intake: Intake | None = None
    complaint: str = ""
    choice: list[str] = field(default_factory=list)  # columns there are


def read_stories() -> Intake | None:
    """What is to be learned, from the place chosen; None while there is nothing yet."""
    most_mb = manager().limits.max_upload_mb
    limits = Limits(max_bytes=most_mb * 10**6)
    place = st.segmented_control("Your stories", [SAMPLE, FILE, PASTE, HUB], default=SAMPLE, key="place", required=True)
    if place == SAMPLE:
        st.caption(
            "Forty-four entries of a pirate captain's log, a style the storyteller has never seen. "
            "It ships with Taleloom, for a first try."
        )
        return remembered(("sample",), lambda text, prompt: read_sample())
    if place == FILE:
        uploaded = st.file_uploader(
            "TXT, Markdown, JSON lines, CSV, Parquet, or a ZIP of them",
            type=FILE_TYPES,
            key="file",
            max_upload_size=most_mb,
            help="In a text file separate stories by a line of three dashes, or of <|endoftext|>.",
        )
        if uploaded is None:
            return None
        return remembered(
            ("file", uploaded.file_id),
            lambda text, prompt: read_upload(
                uploaded.name, uploaded.getvalue(), text_column=text, prompt_column=prompt, limits=limits
            ),
        )
    if place == PASTE:
        pasted = st.text_area("Stories, separated by a line of three dashes", key="pasted", height=220)
        return (
            remembered(("paste", pasted), lambda text, prompt: read_paste(pasted, limits)) if pasted.strip() else None
        )
    with st.form("hub", border=False):
        left, right = st.columns([3, 1])
        repo = left.text_input("Data set", placeholder="roneneldan/TinyStories", key="repo").strip()
        split = right.text_input("Split", "train", key="split").strip()
        is_asked = st.form_submit_button("Fetch", icon=":material/download:")
    if not repo:
        return None
    with st.spinner("Fetching the stories …"):
        return remembered(
            ("hub", repo, split),
            lambda text, prompt: read_dataset(
                repo, split, text, prompt, limits=limits, for_stranger=not is_ones_own_machine()
            ),
            again=is_asked,
        )


def remembered(
    source: tuple[str, ...], read: Callable[[str | None, str | None], Intake], again: bool = False
) -> Intake | None:
    """Read once, not at every rerun, with the columns chosen; what is wrong with it is said at every one.

    Args:
        read: called with the names of the stories' and the ideas' column, None while they are not chosen.
        again: try once more what could not be read.
    """
    state = st.session_state
    columns = (state.get(column_key(source, "text")), state.get(column_key(source, "prompt")))
    reading: Reading | None = state.get("reading")
    if reading is None or (reading.source, reading.columns) != (source, columns) or (again and reading.complaint):
        choice = reading.choice if reading and reading.source == source else []
        reading = Reading(source, columns, choice=choice)
        try:
            reading.intake = read(*columns)
            reading.choice = reading.intake.columns
        except TaleloomError as error:
            reading.complaint = str(error)
        state.reading = reading
    show_columns(reading)
    if reading.complaint:
        st.error(literally(reading.complaint))
    return reading.intake


def column_key(source: tuple[str, ...], kind: str) -> str:
    return f"{kind}_column_{hash(source)}"  # of this table: another one has other columns


def show_columns(reading: Reading) -> None:
    """Which of a table's columns hold stories and ideas."""
    if len(reading.choice) < 2:
        return
    intake = reading.intake
    used = (intake.text_column, intake.prompt_column or "") if intake else reading.columns
    left, right = st.columns(2)
    text = left.selectbox(
        "Column with the stories",
        reading.choice,
        _index(reading.choice, used[0]),
        key=column_key(reading.source, "text"),
    )
    options = ["", *reading.choice]
    prompt = right.selectbox(
        "Column with their ideas",
        options,
        _index(options, used[1]),
        key=column_key(reading.source, "prompt"),
        format_func=lambda column: column or "none",
    )
    if intake and (text, prompt) == used:
        reading.columns = (text, prompt)  # the next run asks for what was found by its name, and need not read again


def _index(options: list[str], chosen: str | None) -> int:
    return options.index(chosen) if chosen in options else 0


def show_preview(intake: Intake, settings: FineTuneSettings, base: str | None) -> Check | None:
    """What was read and what learning it will take; None when it cannot be started so."""
    try:
        with st.spinner("Looking them over …"):
            reading: Reading = st.session_state.reading
            check, estimate = looked_over(intake, (reading.source, reading.columns), settings, base)
    except TaleloomError as error:
        st.error(literally(str(error)))
        return None
    facts = [
        f"{check.n_train:,} stories to learn from, {check.n_test:,} held out",
        f"{check.n_tokens:,} tokens",
        f"{check.median:,} in a story (from {check.shortest:,} to {check.longest:,})",
    ]
    if check.unknown_share > SHOWN_UNKNOWN_SHARE:
        facts.append(f"{check.unknown_share:.1%} of them in characters it has no piece for")
    st.html("<div class='tl-facts'>" + "".join(f"<span>{html.escape(fact)}</span>" for fact in facts) + "</div>")
    for warning in dict.fromkeys([*intake.warnings, *check.warnings]):
        st.warning(literally(warning))
    with st.expander("The first stories as they were read"):
        for row in intake.rows[:3]:
            if row["prompt"]:
                st.caption(literally(f"Idea: {row['prompt']}"))
            st.text(row["text"][:1500])
    minutes = estimate.seconds / 60
    takes = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{10 * max(1, round(6 * minutes))} seconds"
    st.caption(
        f"{estimate.n_steps:,} steps: about {takes} at most on this machine, {estimate.memory_mb:,.0f} MB of memory, "
        f"{estimate.checkpoint_mb:,.0f} MB on disk. It ends earlier when nothing more is gained."
    )
    return check


@st.cache_data(max_entries=20, show_spinner=False)
def looked_over(_intake: Intake, read_from: Any, settings: FineTuneSettings, base: str | None) -> Any:
    """Kept by what was read from where, so that a rerun does not count it all again."""
    return plan(_intake, settings, base)


def base_name(model: str | None) -> str:
    return "The bundled storyteller" if model is None else model


# How to learn.


def choose_preset() -> FineTuneSettings | None:
    preset = st.segmented_control(
        "How long",
        list(PRESETS),
        default="quick",
        key="preset",
        required=True,
        format_func=PRESETS.__getitem__,
        help=PRESET_HELP,
    )
    with st.expander("For experts", icon=":material/tune:"):
        return choose_settings(FINE_TUNE_PRESETS[cast(str, preset)], cast(str, preset))


def show_new() -> None:
    intake = read_stories()
    with st.container(key="how"):
        left, right = st.columns(2)
        base = left.selectbox(
            "Start from", [None, *(model.name for model in visible_models())], key="base", format_func=base_name
        )
        name = right.text_input("Name of the new storyteller", key="new_name", placeholder="pirates", max_chars=60)
        settings = choose_preset()
        ideas = st.text_area(
            "Test ideas, one a line", TEST_IDEAS, height=100, key="ideas",
            help="Told again and again while it learns. Up to four.",
        )  # fmt: skip
    if intake is None or settings is None or (check := show_preview(intake, settings, base)) is None:
        return
    # No callback: one gets what was on the page before the name that was typed just now.
    if st.button("Start learning", type="primary", icon=":material/school:"):
        try:
            job = manager().create(
                name.strip() or free_name(),
                [dict(row) for row in intake.rows],
                settings,
                base=base,
                source=intake.name,
                test_ideas=tuple(line for line in ideas.splitlines() if line.strip()),
                visitor=asker(),
                n_tokens=check.n_tokens,
            )
        except TaleloomError as error:
            st.error(literally(str(error)))
        else:
            st.switch_page("pages/train/job.py", query_params={"job": job.id})


def free_name() -> str:
    """A name for those who gave none."""
    taken = {job.name.casefold() for job in manager().list()} | {model.name.casefold() for model in own_models()}
    return next(name for i in range(1, 10_000) if (name := f"storyteller-{i}") not in taken)


def my_jobs() -> list[Job]:
    """Newest first."""
    return [job for job in manager().list()[::-1] if is_mine(job.visitor)]


def show_jobs() -> None:
    jobs = my_jobs()
    if not jobs:
        return
    st.subheader("Fine-tunes", anchor=False)
    show_polled(show_list, POLL_S if any(job.is_active for job in jobs) else None)
    show_comparison(jobs)


def show_list() -> None:
    for job in my_jobs():
        with st.container(horizontal=True, vertical_alignment="center", key=f"row_{job.id}"):
            label = literally(job.name or job.id)
            st.page_link("pages/train/job.py", label=label, query_params={"job": job.id})
            st.badge(str(job.state), color=BADGES[job.state])
            since = time.strftime("%d %b %H:%M", time.localtime(job.created)) + ". " if job.created else ""
            st.caption(literally(f"{since}{job.note if job.state is JobState.DONE else job.message}"))


def show_comparison(jobs: list[Job]) -> None:
    """Held-out curves of several runs on one chart."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        name = job.name or job.id
        name = f"{name} ({job.id})" if name in curves else name  # one that was tried again
        curves[name] = [m for m in manager().metrics(job.id) if "own_bits_per_byte" in m]
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if len(curves) < 2:
        return
    chosen = st.multiselect("Compare on their held-out stories", list(curves), list(curves)[:3])
    rows = [
        {"step": m["step"], "bits per byte": m["own_bits_per_byte"], "run": name}
        for name in chosen
        for m in curves[name]
    ]
    if rows:
        y = alt.Y("bits per byte:Q", scale=alt.Scale(zero=False))
        st.altair_chart(alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(x="step:Q", y=y, color="run:N"))


st.html(
    "<h1 class='tl-wordmark'>Teach it your stories</h1>"
    "<p class='tl-tagline'>Bring twenty, watch it learn, write with it a minute later.</p>"
)
if manager().limits.mode == "off":
    st.info("Training is switched off on this site. Run Taleloom on your own computer to teach it your stories.")
elif manager().limits.sign_in and not signed_in():
    st.info("Sign in to teach a storyteller your stories.")
    st.button("Sign in", on_click=st.login)
else:
    show_new()
    show_jobs()
