"""`taleloom finetune` and `taleloom jobs ...`: the fine-tune page's twin, on the same job folders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from model.cli_shared import DEVICE, JSON
from model.config import FINE_TUNE_PRESETS, LORA_TARGETS
from model.errors import InputError, TaleloomError
from model.jobs.manager import JobManager
from model.jobs.record import Job, JobState

POLL_S = 0.5
# Settings that have an option of their own; None leaves the preset's.
OPTIONS: dict[str, Any] = {
    "method": click.Choice(["full", "lora"]),
    "epochs": float,
    "max_steps": int,
    "learning_rate": float,
    "schedule": click.Choice(["linear", "cosine", "constant"]),
    "rows_per_step": int,
    "rows_per_pass": int,
    "weight_decay": float,
    "dropout": float,
    "replay_share": float,
    "frozen_layers": int,
    "lora_rank": int,
    "lora_alpha": float,
    "evaluations": int,
    "patience": int,
    "seed": int,
}


def settings_options(command: Any) -> Any:
    """Give a command one option for each setting in OPTIONS."""
    for name, kind in reversed(OPTIONS.items()):
        shown = "Default: as the preset or the job has it."
        if name == "lora_rank":
            shown = "LoRA of this rank instead of all weights."
        command = click.option("--" + name.replace("_", "-"), name, type=kind, default=None, help=shown)(command)
    return click.option(
        "--lora-target", "lora_targets", multiple=True, type=click.Choice(LORA_TARGETS), help="Default: all."
    )(command)


@click.command()
@click.option("--data", help="A TXT, MD, JSONL, CSV, Parquet or ZIP file. Default: the sample set, a captain's log.")
@click.option("--dataset", help="A Hub data set id, instead of --data.")
@click.option("--split", default="train", show_default=True, help="Of the Hub data set.")
@click.option("--text-column", help="Column of a table that holds the stories.")
@click.option("--prompt-column", help="Column with the idea of each story.")
@click.option("--name", required=True, help="What the new storyteller will be called.")
@click.option("--preset", type=click.Choice(list(FINE_TUNE_PRESETS)), default="quick", show_default=True)
@click.option("--model", "base", help="The storyteller to start from. Default: bundled.")
@click.option("--idea", "ideas", multiple=True, help="A test idea, told again and again; up to four.")
@DEVICE
@click.option("--detach", is_flag=True, help="Do not wait: `taleloom jobs` tells how it goes.")
@settings_options
@JSON
def finetune(
    data: str | None,
    dataset: str | None,
    split: str,
    text_column: str | None,
    prompt_column: str | None,
    name: str,
    preset: str,
    base: str | None,
    ideas: tuple[str, ...],
    device: str,
    detach: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Teach a storyteller your own stories; afterwards `taleloom tell --model NAME` tells with it.

    Interrupted, the job is paused: `taleloom jobs resume` goes on. With --json it ends with one JSON object.
    """
    from model.intake import read_dataset, read_file, read_sample
    from model.jobs.plan import plan

    if data and dataset:
        raise InputError("Give --data or --dataset, not both.")
    if dataset:
        taken = read_dataset(dataset, split, text_column, prompt_column, lambda line: click.echo(line, err=True))
    elif data:
        taken = read_file(Path(data), text_column=text_column, prompt_column=prompt_column)
    else:
        taken = read_sample()
    if base and (folder := Path(base).expanduser()).is_dir():
        base = str(folder.resolve())  # the worker runs in another folder
    settings = dataclasses.replace(FINE_TUNE_PRESETS[preset], **_changed(changes))
    check, estimate = plan(taken, settings, base, folders=True)
    for warning in dict.fromkeys([*taken.warnings, *check.warnings]):
        click.echo(f"Note: {warning}", err=True)
    click.echo(
        f"{check.n_train:,} stories to learn from, {check.n_test:,} held out, {check.n_tokens:,} tokens; "
        f"{estimate.n_steps:,} steps, about {max(1, round(estimate.seconds / 60))} min at most.",
        err=True,
    )
    manager = JobManager()
    rows = [dict(row) for row in taken.rows]
    job = manager.create(name, rows, settings, base, taken.name, ideas, device=device, n_tokens=check.n_tokens)
    if detach:
        manager.detach()
        click.echo(
            json.dumps(_facts(job)) if as_json else f"Job {job.id} is {job.state}. See: taleloom jobs show {job.id}"
        )
        return
    manager.keep_tending()
    job = _watch(manager, job, quiet=as_json)
    result = manager.result(job.id)
    if as_json:
        click.echo(json.dumps({**_facts(job), "result": result}))
    if job.state is not JobState.DONE or result is None:
        raise TaleloomError(f"The job is {job.state}: {job.message}")
    if not as_json:
        own = result.get("own_bits_per_byte")
        if own:
            click.echo(f"Bits per byte on your held-out stories: {own['before']:.3f} before, {own['after']:.3f} after.")
        click.echo(f"Tell with it: taleloom tell 'a shy dragon' --model {result['name']}")


def _changed(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line; a rank asks for LoRA."""
    changed = {name: value for name, value in options.items() if value not in (None, ())}
    if "lora_rank" in changed:
        changed.setdefault("method", "lora")
    return changed


def _watch(manager: JobManager, job: Job, quiet: bool) -> Job:
    """Wait for the job's end; what it learns is told on the way. Interrupted, the job is paused."""
    n_shown = 0
    try:
        while True:
            job = manager.get(job.id)
            if not quiet:
                evaluations = [record for record in manager.metrics(job.id) if record.get("evaluation")]
                for record in evaluations[n_shown:]:
                    scores = ", ".join(
                        f"{key.removesuffix('_bits_per_byte').replace('_', ' ')} {value:.3f}"
                        for key, value in record.items()
                        if key.endswith("_bits_per_byte")
                    )
                    click.echo(f"step {record['step']}/{record['steps']}: bits per byte {scores}", err=True)
                n_shown = len(evaluations)
            if not job.is_active:
                return job
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        with contextlib.suppress(InputError):  # it has just ended
            manager.pause(job.id)
            click.echo(f"\nPaused. Go on with: taleloom jobs resume {job.id}", err=True)
        manager.detach()  # others may wait for their turn
        sys.exit(130)


def _facts(job: Job) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": job.id, "name": job.name, "state": str(job.state), "message": job.message}
    return {**facts, "step": job.step, "steps": job.steps, "base": job.base, "source": job.source, "note": job.note}


@click.group()
def jobs() -> None:
    """Fine-tunes: those waiting, running and done."""


@jobs.command("list")
@JSON
def list_jobs(as_json: bool) -> None:
    """All jobs, newest first."""
    found = JobManager().list()[::-1]
    if as_json:
        click.echo(json.dumps([_facts(job) for job in found]))
    for job in found if not as_json else ():
        click.echo(f"{job.id}  {job.state:<9}  {job.progress:4.0%}  {job.name}  {job.message}")
    if not found and not as_json:
        click.echo("There are no jobs. Begin one: taleloom finetune --name pirates")


def job_command(*more: Any) -> Any:
    """A command about one job, which gets it with its manager; `more` are further options."""

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def with_job(job: str, **options: Any) -> None:
            manager = JobManager()
            command(manager, _find(manager, job), **options)

        for option in reversed(more):
            with_job = option(with_job)
        return jobs.command()(click.argument("job")(with_job))

    return decorate


def _find(manager: JobManager, asked: str) -> Job:
    """The job of that id, else the latest one of that name."""
    named = [job for job in manager.list() if asked in (job.id, job.name)]
    return named[-1] if named else manager.get(asked)


def _say(manager: JobManager, id: str, as_json: bool) -> None:
    job = manager.get(id)
    click.echo(json.dumps(_facts(job)) if as_json else f"{job.id} ({job.name}) is {job.state}: {job.message}")


@job_command(JSON)
def show(manager: JobManager, job: Job, as_json: bool) -> None:
    """One job, by id or name: state, settings, scores, result."""
    evaluations = [record for record in manager.metrics(job.id) if record.get("evaluation")]
    facts = {**_facts(job), "settings": dataclasses.asdict(job.settings)}
    facts |= {"evaluations": evaluations, "result": manager.result(job.id)}
    click.echo(json.dumps(facts) if as_json else json.dumps(facts, indent=2))


@job_command(click.option("--lines", type=click.IntRange(1), default=50, show_default=True))
def logs(manager: JobManager, job: Job, lines: int) -> None:
    """The end of a job's log."""
    click.echo(manager.log(job.id, lines))


@job_command(JSON)
def pause(manager: JobManager, job: Job, as_json: bool) -> None:
    """Stop after the present step, to be resumed exactly."""
    manager.pause(job.id)
    _say(manager, job.id, as_json)


@job_command(JSON)
def resume(manager: JobManager, job: Job, as_json: bool) -> None:
    """Go on with a paused, lost or failed job."""
    manager.resume(job.id)
    manager.detach()
    _say(manager, job.id, as_json)


@job_command(JSON)
def cancel(manager: JobManager, job: Job, as_json: bool) -> None:
    """End a job; what it has learned until then is dropped."""
    manager.cancel(job.id)
    manager.detach()  # someone has to end a worker that does not listen
    _say(manager, job.id, as_json)


@job_command(JSON)
def retry(manager: JobManager, job: Job, as_json: bool) -> None:
    """Begin a failed, cancelled or lost job anew."""
    anew = manager.retry(job.id)
    manager.detach()
    _say(manager, anew.id, as_json)


@job_command(click.option("--name", required=True, help="Of the other storyteller."), settings_options, JSON)
def clone(manager: JobManager, job: Job, name: str, as_json: bool, **changes: Any) -> None:
    """Learn a job's stories once more, with other settings."""
    other = manager.clone(job.id, name, **_changed(changes))
    manager.detach()
    _say(manager, other.id, as_json)


@job_command()
def delete(manager: JobManager, job: Job) -> None:
    """Delete a job's folder; the storyteller that came of it stays."""
    manager.delete(job.id)
