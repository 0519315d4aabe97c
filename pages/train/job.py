"""How a fine-tune goes: its curves, the test ideas told again and again, its log; pause, resume, cancel, vary, delete.

The page only looks, once a second, at what the worker has written, so closing it ends nothing. Text of readers and
models is shown as it is, never as markdown or HTML.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import altair as alt
import streamlit as st

from model.config import FineTuneSettings
from model.errors import InputError, TaleloomError
from model.jobs.record import Job, JobState
from model.own_models import own_models
from pages.shared.learning import choose_settings
from pages.shared.parts import BADGES, guarded, is_mine, literally, manager, show_complaint, show_polled

POLL_S = 1.0
CHART_HEIGHT = 320
LEGEND_GAP, LEGEND_ROW = 46, 30  # what the legend takes below a chart, in pixels of Streamlit's theme
COLOURS = ["#b0503d", "#8a97a5", "#c98f2b"]  # seen on paper and by lamplight
KINDS = {"own": "your held-out stories", "own_train": "stories it learned from", "original": "its old stories"}


def find(job_id: str) -> Job:
    """Raises InputError when there is no such job, or it is another visitor's."""
    job = manager().get(job_id)
    if not is_mine(job.visitor):
        raise InputError(f"There is no job {job_id!r}. It may have been deleted.")
    return job


def show_job(job_id: str) -> None:
    job = find(job_id)
    looked_at = POLL_S if job.is_active else None
    show_polled(show_progress, looked_at, job_id, abilities(job))
    show_controls(job)
    if job.state is JobState.DONE:
        show_result(job)
    show_polled(show_flip_book, looked_at, job_id)
    show_details(job)
    if job.name:
        show_variation(job)


def abilities(job: Job) -> tuple[bool, ...]:
    """What can be done with the job: its page is drawn anew when that changes, whoever did it."""
    can = (job.can_pause, job.can_resume, job.can_cancel, job.can_retry, job.can_delete)
    return (job.is_active, *can)


def show_details(job: Job) -> None:
    jobs, key = manager(), f"note_{job.id}"
    with st.expander("Settings and log"):
        settings = {k: v for k, v in vars(job.settings).items() if v != getattr(FineTuneSettings(), k)}
        changed = ", ".join(f"{name} {value}" for name, value in settings.items())
        base = job.base or "the bundled storyteller"
        st.text(f"Stories: {job.source or 'own'}\nStarts from: {base}\nSettings: {changed or 'the defaults'}")
        if job.name:
            st.text_input(
                "Note", job.note, key=key, on_change=lambda: guarded(lambda: jobs.note(job.id, st.session_state[key]))
            )
        st.code(jobs.log(job.id) or "The log is empty.", language=None, height=240)


def show_variation(job: Job) -> None:
    """The same stories once more, learned otherwise."""
    with st.expander("The same stories, learned otherwise"):
        name = st.text_input("Name of the other storyteller", key=f"clone_{job.id}", max_chars=60)
        settings = choose_settings(job.settings, f"clone_{job.id}")
        if settings and st.button("Start it", icon=":material/school:", key=f"start_clone_{job.id}"):
            try:
                go_to(manager().clone(job.id, name, **asdict(settings)))
            except TaleloomError as error:
                st.error(literally(str(error)))
            else:
                st.rerun()


def go_to(job: Job) -> None:
    st.session_state.next_job = job.id


def show_progress(job_id: str, shown: tuple[bool, ...]) -> None:
    """The part that is looked at again and again."""
    jobs = manager()
    try:
        job, metrics = find(job_id), jobs.metrics(job_id)
    except InputError:  # deleted meanwhile, in another tab or by the command line
        st.rerun()
    if abilities(job) != shown:
        st.rerun()  # the whole page: its buttons change
    with st.container(horizontal=True, vertical_alignment="center"):
        st.html(f"<h2 class='tl-name'>{html.escape(job.name or job.id)}</h2>", width="content")
        st.badge(str(job.state), color=BADGES[job.state])
    steps = [m for m in metrics if "loss" in m]
    evaluations = [m for m in metrics if m.get("evaluation")]
    st.progress(job.progress, text=literally(job.message) or None)
    if steps:
        last = steps[-1]
        facts = [f"step {last['step']:,} of {last['steps']:,}", f"loss {last['loss']:.3f}"]
        facts += [f"{last['tokens_per_second']:,.0f} tokens a second", f"{last['memory_mb']:,.0f} MB"]
        if job.state is JobState.RUNNING:
            facts.append(f"{_time(last['eta_s'])} left")
        st.html("<div class='tl-facts'>" + "".join(f"<span>{fact}</span>" for fact in facts) + "</div>")
        show_curves(steps, evaluations)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def show_curves(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    scores = [
        {"step": e["step"], "bits per byte": e[f"{kind}_bits_per_byte"], "of": label}
        for e in evaluations
        for kind, label in KINDS.items()
        if f"{kind}_bits_per_byte" in e
    ]
    n_lines = len({score["of"] for score in scores})
    left, right = st.columns(2)
    thinned = [{k: m[k] for k in ("step", "loss", "lr")} for m in steps[:: max(1, len(steps) // 400)]]
    loss = alt.Chart(alt.Data(values=thinned)).encode(x=alt.X("step:Q", title="step"))
    lines = loss.mark_line(color=COLOURS[0]).encode(
        y=alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False))
    )
    rates = loss.mark_line(color=COLOURS[1], strokeDash=[3, 3]).encode(y=alt.Y("lr:Q", title="learning rate"))
    left.altair_chart(alt.layer(lines, rates).resolve_scale(y="independent").properties(height=CHART_HEIGHT))
    if scores:
        right.altair_chart(
            alt.Chart(alt.Data(values=scores))
            .mark_line(point=True)
            .encode(
                x=alt.X("step:Q", title="step"),
                y=alt.Y("bits per byte:Q", title="bits per byte", scale=alt.Scale(zero=False)),
                color=alt.Color(
                    "of:N", scale=alt.Scale(range=COLOURS), legend=alt.Legend(orient="bottom", title=None, columns=1)
                ),
            )
            .properties(height=CHART_HEIGHT + LEGEND_GAP + LEGEND_ROW * n_lines)  # both axes at one height
        )


def show_flip_book(job_id: str) -> None:
    """The test ideas as it told them before it learned anything, and at a step of choice."""
    try:
        samples = manager().samples(job_id)
    except InputError:  # deleted meanwhile: show_progress draws the page anew
        return
    if not samples:
        st.caption("The test ideas are told here soon.")
        return
    stories = {sample["step"]: sample["stories"] for sample in samples}
    steps = list(stories)
    chosen = steps[-1]
    if len(steps) > 1:
        key, newest_key = f"flip_{job_id}", f"flip_{job_id}_newest"
        is_followed = st.session_state.get(key) == st.session_state.get(newest_key)
        if is_followed or st.session_state.get(key) not in steps:  # whoever looks at the newest is shown the newest
            st.session_state[key] = steps[-1]
        st.session_state[newest_key] = steps[-1]
        chosen = st.select_slider("The same ideas, told after step", steps, key=key)
    for i, story in enumerate(stories[chosen]):
        st.html(f"<div class='tl-idea'>“{html.escape(story['idea'])}”, seed {story['seed']}</div>")
        before, after = st.columns(2)
        with before:
            st.caption("Before")
            st.html(f"<article class='tl-sample'>{_paragraphs(stories[steps[0]][i]['text'])}</article>")
        with after:
            st.caption(f"After step {chosen}")
            st.html(f"<article class='tl-sample'>{_paragraphs(story['text'])}</article>")


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in text.split("\n") if line.strip())


def show_controls(job: Job) -> None:
    jobs = manager()

    def act(label: str, icon: str, action: Callable[[], Any], **more: Any) -> None:
        st.button(label, icon=f":material/{icon}:", on_click=lambda: guarded(action), key=f"{label}_{job.id}", **more)

    def delete() -> None:
        jobs.delete(job.id)
        st.session_state.next_job = ""

    with st.container(horizontal=True, gap="small"):
        if job.can_pause:
            act("Pause", "pause", lambda: jobs.pause(job.id))
        if job.can_resume:
            act("Resume", "play_arrow", lambda: jobs.resume(job.id), type="primary")
        if job.can_cancel:
            act("Cancel", "stop", lambda: jobs.cancel(job.id))
        if job.can_retry:
            act("Try again", "refresh", lambda: go_to(jobs.retry(job.id)))
        if job.can_delete:
            with st.popover("Delete", icon=":material/delete:", type="tertiary"):
                st.text("The curves, samples and stories of this fine-tune go. A storyteller that came of it stays.")
                act("Delete it", "delete", delete)


def show_result(job: Job) -> None:
    result = manager().result(job.id)
    if result is None:
        return
    st.subheader("What came of it", anchor=False)
    left, middle, right = st.columns(3)
    for column, kind, label in ((left, "own", "Your held-out stories"), (middle, "original", "Its old stories")):
        if scores := result.get(f"{kind}_bits_per_byte"):
            change = scores["after"] - scores["before"]
            column.metric(
                f"{label}, bits per byte", f"{scores['after']:.3f}", f"{change:+.3f}", delta_color="inverse",
                help="How surprised it is by stories it did not learn from; lower is better.",
            )  # fmt: skip
    memory = result["memorised"]
    right.metric(
        "Learned by heart", f"{memory['longest_run_words']} words",
        help=f"The longest stretch in {memory['stories']} stories that stands word for word in yours.",
    )  # fmt: skip
    st.caption(f"{result['stopped_because']} The best was after step {result['best_step']:,} of {result['steps']:,}.")
    made = next((own for own in own_models() if own.job == job.id), None)  # it may have been renamed
    if made is None:
        st.caption("The storyteller that came of it was deleted.")
    elif st.button(f"Write with {literally(made.name)}", type="primary", icon=":material/auto_stories:", key="write"):
        st.session_state.wanted = made.name
        st.switch_page("pages/create/story.py")


next_job = st.session_state.pop("next_job", None)
if next_job == "" or not (next_job or st.query_params.get("job")):
    st.switch_page("pages/train/finetune.py")
if next_job:
    st.query_params["job"] = next_job
st.page_link("pages/train/finetune.py", label="All fine-tunes", icon=":material/arrow_back:")
show_complaint()
try:
    show_job(st.query_params["job"])
except TaleloomError as error:
    st.error(literally(str(error)))
