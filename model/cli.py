"""The command `taleloom`. Thin: each subcommand checks its input and calls the part that does the work."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from model.cli_jobs import finetune, jobs
from model.cli_shared import DEVICE, FILE, JSON, WHOLE, progress
from model.cli_train import data, train
from model.config import CHECKOUT, SamplingParams
from model.drafts import N_DRAFTS
from model.errors import InputError, TaleloomError

DEFAULTS = SamplingParams()
MODEL = click.option("--model", help="A folder, a Hub id (REPO[@revision]) or a name of your own. Default: bundled.")


class Commands(click.Group):
    """Shows a TaleloomError as one sentence and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has left
        except (TaleloomError, OSError) as error:
            click.echo(f"taleloom: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="taleloom")
def main() -> None:
    """Taleloom: a small storyteller."""


@main.command()
@click.argument("prompt")
@click.option("--idea", "mode", flag_value="idea", help="PROMPT is an idea to make a story of.")
@click.option("--opening", "mode", flag_value="opening", help="PROMPT is the story's beginning, to be continued.")
@click.option("--seed", type=int, help="The same seed tells the same story again.")
@click.option(
    "--drafts",
    default=N_DRAFTS,
    type=click.IntRange(1, 64),
    help="Without a seed: how many to try; the story that keeps best to PROMPT is told.",
)
@click.option("--max-tokens", type=int, default=DEFAULTS.max_tokens)
@click.option("--temperature", type=float, default=DEFAULTS.temperature)
@click.option("--top-k", type=int, default=DEFAULTS.top_k)
@click.option("--top-p", type=float, default=DEFAULTS.top_p)
@click.option("--min-p", type=float, default=DEFAULTS.min_p)
@click.option("--repetition-penalty", type=float, default=DEFAULTS.repetition_penalty)
@MODEL
@DEVICE
@JSON
def tell(
    prompt: str,
    mode: Literal["idea", "opening"] | None,
    drafts: int,
    model: str | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Tell a story from PROMPT and stream it."""
    from model.storyteller import Storyteller

    params = SamplingParams(**settings)
    with Storyteller.load(model, device=device, progress=progress) as storyteller:
        story = storyteller.tell(prompt, params, mode=mode, n_drafts=drafts)
        if story.mode == "opening" and not as_json:
            click.echo(story.prompt, nl=False)
        for piece in story:
            if not as_json:
                click.echo(piece, nl=False)
        if as_json:
            click.echo(json.dumps(story.summary()))
        else:
            click.echo()
            progress(f"[{story.n_tokens} tokens, {story.tokens_per_second:.0f} a second, seed {story.params.seed}]")
        if story.error:
            raise TaleloomError(story.error)


@main.command()
@click.option("--data", multiple=True, type=FILE, help="Stories to predict: JSONL, TXT or Parquet. Several: one each.")
@MODEL
@DEVICE
@click.option("--int8", is_flag=True, help="Score the rounded weights that stories are written with on a CPU.")
@click.option("--stories", default=0, type=click.IntRange(min=0), help="Tell and measure N stories from ideas.")
@click.option(
    "--corpus", multiple=True, type=FILE, help="Training text, for what those copy. May be given several times."
)
@click.option("--real", type=FILE, help="Real stories to compare those with, and to continue.")
@click.option("--openings", default=500, type=WHOLE, help="How many of the real stories to continue.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for evaluation.json, a table, a plot, the stories."
)
@JSON
def evaluate(
    data: tuple[Path, ...],
    model: str | None,
    device: str,
    int8: bool,
    stories: int,
    corpus: tuple[Path, ...],
    real: Path | None,
    openings: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a storyteller: bits per byte of the stories in --data (lower is better), cloze, and what it tells."""
    from model.checkpoint import write_atomically
    from model.evaluate import evaluate as measure
    from model.evaluation.report import markdown, plot

    only_bits = len(data) == 1 and not stories and not out
    with click.progressbar(length=100, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        results, told = measure(
            model,
            device,
            int8=int8,
            data=data,
            with_cloze=not only_bits,
            n_stories=stories,
            corpus=corpus,
            real=real,
            n_openings=openings,
            report=progress,
            progress=lambda done, total: bar.update(100 * done // total - bar.pos),
        )
    if only_bits:
        scores = results["sources"].popitem()[1]
        if as_json:
            click.echo(json.dumps(scores))
        else:
            for name, value in scores.items():
                click.echo(f"{name:14} {value:,.4f}" if isinstance(value, float) else f"{name:14} {value:,}")
        return
    table = markdown(results)
    click.echo(json.dumps(results) if as_json else table)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "evaluation.json", json.dumps(results, indent=2))
        write_atomically(out / "evaluation.md", table)
        if stories:
            write_atomically(out / "evaluation.png", plot(results))
        for name, of_kind in told.items():
            write_atomically(out / f"{name}.jsonl", "".join(json.dumps(asdict(story)) + "\n" for story in of_kind))
        click.echo(f"The evaluation is in {out}", err=True)


@main.command()
@MODEL
@DEVICE
@click.option("--peers", is_flag=True, help="Compare with others on one thread (pip install 'taleloom[bench]').")
@JSON
def bench(model: str | None, device: str, peers: bool, as_json: bool) -> None:
    """Measure how fast stories are written on this machine."""
    from model.bench import bench as measure

    results = measure(model, device, peers, progress)
    if as_json:
        click.echo(json.dumps(results))
        return
    for name, value in results.items():
        shown = value if isinstance(value, dict) else {"": value}
        for key, number in shown.items():
            click.echo(f"{name:32}{key!s:>4} {number:,.1f}" if isinstance(number, float) else f"{name:36} {number}")


@main.command()
@MODEL
@click.option("--format", "form", required=True, type=click.Choice(["gguf", "hf"]), help="For llama.cpp, transformers.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file (gguf) or folder (hf) to write.")
@click.option("--type", "kind", type=click.Choice(["f32", "f16", "q8_0"]), help="Weights in a gguf. Default: f16.")
def export(model: str | None, form: str, out: Path, kind: str | None) -> None:
    """Write the storyteller for another program."""
    from model.find import find_model
    from model.hub.export import export_gguf, export_hf

    if form == "hf" and kind:
        raise InputError("--type is for --format gguf; a folder keeps the weights as they are.")
    folder = find_model(model, progress)
    if form == "gguf":
        export_gguf(folder, out, kind or "f16")
    else:
        export_hf(folder, out)
    click.echo(f"The storyteller is in {out}")


@main.group()
def worlds() -> None:
    """Story worlds: consistent little stories from plain data (docs/worlds.md)."""


FOLDER = click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the worlds are. Default: the bundled ones."
)
WORLD = click.option("--world", "names", multiple=True, help="Only this world. May be given several times.")


@worlds.command()
@click.option("--n", default=1000, type=WHOLE, help="How many stories.")
@click.option("--seed", default=1, help="The same seed writes the same stories.")
@click.option("--out", type=click.Path(path_type=Path), help="A JSONL file. Default: standard output.")
@WORLD
@FOLDER
def expand(n: int, seed: int, out: Path | None, names: tuple[str, ...], folder: Path | None) -> None:
    """Tell N different stories, the worlds in turn, as JSON lines with prompts."""
    from model.checkpoint import write_atomically
    from model.worlds.world import BUNDLED, expand, read_worlds

    lines = [json.dumps(story) for story in expand(read_worlds(folder or BUNDLED, names), n, seed)]
    if out:
        write_atomically(out, "".join(line + "\n" for line in lines))
        click.echo(f"{len(lines):,} stories are in {out}", err=True)
    else:
        for line in lines:
            click.echo(line)
    if len(lines) < n:
        progress(f"The worlds have only {len(lines):,} different stories to tell.")


@worlds.command()
@WORLD
@FOLDER
@click.option("--stories", default=0, help="Also print so many stories of each.")
def check(names: tuple[str, ...], folder: Path | None, stories: int) -> None:
    """Find what a reader would object to."""
    from model.worlds.check import check
    from model.worlds.world import BUNDLED, read_worlds

    found = 0
    for world in read_worlds(folder or BUNDLED, names):
        complaints = check(world)
        found += len(complaints)
        click.echo(f"{world.name}: " + ("\n  ".join(["", *complaints]) if complaints else "nothing found"))
        for seed in range(stories):
            story = world.tell(seed)
            click.echo(f"\n[{story['prompt']}]\n{story['title']}\n{story['text']}")
    if found:
        raise TaleloomError(f"{found} complaints.")


@main.command()
@click.option("--port", default=8501)
@click.option("--address", default="localhost")
@MODEL
@DEVICE
def app(port: int, address: str, model: str | None, device: str) -> None:
    """Serve the web app."""
    script = CHECKOUT / "app.py"
    if not script.is_file():
        raise TaleloomError("app.py is missing: run Taleloom from its checkout (pip install -e .).")
    environment = {**os.environ, "TALELOOM_DEVICE": device}
    if model:
        environment["TALELOOM_MODEL"] = str(Path(model).resolve()) if Path(model).is_dir() else model
    command = [sys.executable, "-m", "pages.shared.serve", "run", str(script), "--server.port", str(port)]
    os.chdir(CHECKOUT)  # where .streamlit/config.toml is
    # In place of this process, so that whoever stops it stops the server.
    os.execve(sys.executable, [*command, "--server.address", address], environment)


main.add_command(data)
main.add_command(train)
main.add_command(finetune)
main.add_command(jobs)

if __name__ == "__main__":
    main()
