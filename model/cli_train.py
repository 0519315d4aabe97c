"""`taleloom data build` and `taleloom train`: a storyteller from text."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from model.cli_shared import DEVICE, FILE, WHOLE, progress
from model.config import ModelConfig, TrainingConfig
from model.errors import InputError

SHAPE = ModelConfig()
POSITIVE = click.FloatRange(min=0, min_open=True)


def _prepare_data(
    folder: Path,
    datasets: tuple[str, ...],
    data_root: Path | None,
    tokenizer_of: Path | None,
    context: int,
    vocab_size: int,
    seed: int,
    validation: tuple[Path, ...] = (),
) -> None:
    """Prepare training data in `folder`, unless it is there from the same order.

    The tokenizer is made for it, or taken from a model's folder.
    """
    from model.checkpoint import load_tokenizer, read_config
    from model.hub.pull import pull_dataset
    from model.training.data import prepare, read_rows, resolve_sources

    asked = {"datasets": list(datasets), "context": context, "vocab_size": vocab_size, "seed": seed}
    if tokenizer_of:
        asked["init"] = str(tokenizer_of)
    if not (folder / "data.json").is_file():
        click.echo("Preparing the data ...", err=True)
        sources = resolve_sources(datasets, lambda repo: pull_dataset(repo, partial(click.echo, err=True)), data_root)
        tokenizer = load_tokenizer(tokenizer_of, read_config(tokenizer_of)) if tokenizer_of else None
        texts = {path.name: [row["text"] for row in read_rows(path)] for path in validation}
        summary = prepare(sources, folder, context, vocab_size, tokenizer, seed, asked, texts)
        click.echo(json.dumps(summary, indent=2), err=True)
    elif json.loads((folder / "data.json").read_text()).get("asked") != asked:
        raise InputError(f"{folder} was prepared from other data or settings. Choose another --out, or delete it.")


def _check_one_tokenizer(init: str | None, tokenizer: str | None) -> None:
    if init and tokenizer:
        raise InputError("A model goes on with its own tokenizer: give --init or --tokenizer, not both.")


DATASETS = click.option(
    "--dataset",
    "datasets",
    multiple=True,
    required=True,
    help="A JSONL, TXT or Parquet file, a Hub data set id, or a TOML recipe. May be given several times.",
)
OUT = click.option("--out", required=True, type=FILE, help="Folder of the run; resumes what it holds.")
DATA_ROOT = click.option("--data-root", type=FILE, help="Where a recipe's files lie. Default: beside it.")
INIT = click.option("--init", help="A model to go on from, as in --model; its shape and tokenizer count.")
TOKENIZER = click.option(
    "--tokenizer",
    help="A model, as in --model, whose tokenizer to use instead of --teacher's or one made for the data.",
)
VOCAB_SIZE = click.option("--vocab-size", type=WHOLE, default=SHAPE.vocab_size)
CONTEXT = click.option(
    "--context", type=WHOLE, default=SHAPE.max_position_embeddings, help="Longest sequence, in tokens."
)


@click.group()
def data() -> None:
    """Training data."""


@data.command()
@DATASETS
@OUT
@DATA_ROOT
@INIT
@TOKENIZER
@VOCAB_SIZE
@CONTEXT
@click.option("--seed", default=1)
@click.option(
    "--validation",
    multiple=True,
    type=FILE,
    help="Text that must not be trained on: what the corpus holds of it is counted. May be given several times.",
)
def build(
    datasets: tuple[str, ...],
    out: Path,
    data_root: Path | None,
    init: str | None,
    tokenizer: str | None,
    vocab_size: int,
    context: int,
    seed: int,
    validation: tuple[Path, ...],
) -> None:
    """Prepare a corpus for `taleloom train --out OUT` with the same options; print counts and contamination."""
    from model.checkpoint import read_config
    from model.find import find_model

    _check_one_tokenizer(init, tokenizer)
    initial = find_model(init, progress) if init else None
    if initial:
        context = min(context, read_config(initial).max_position_embeddings)
    tokenizer_of = find_model(tokenizer, progress) if tokenizer else initial
    _prepare_data(out / "data", datasets, data_root, tokenizer_of, context, vocab_size, seed, validation)


@click.command()
@DATASETS
@OUT
@DATA_ROOT
@INIT
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    help="A model, as in --model, whose word is nine tenths of the loss. May be given several times.",
)
@click.option(
    "--twins",
    type=FILE,
    help="Lines of beginning, ending, other beginning, its ending, with tabs between, such as model/training/twins.tsv:"
    " to learn by choosing the right ending.",
)
@click.option(
    "--patterns",
    type=FILE,
    help="Patterns to draw such choices from, such as model/training/patterns.tsv: who has what, who is where.",
)
@TOKENIZER
@VOCAB_SIZE
@CONTEXT
@click.option("--width", type=WHOLE, default=SHAPE.hidden_size)
@click.option("--layers", type=WHOLE, default=SHAPE.num_hidden_layers)
@click.option("--heads", type=WHOLE, default=SHAPE.num_attention_heads)
@click.option("--kv-heads", type=WHOLE, default=SHAPE.num_key_value_heads)
@click.option("--mlp-width", type=WHOLE, default=SHAPE.intermediate_size)
@click.option(
    "--rows-per-step",
    type=WHOLE,
    default=TrainingConfig.rows_per_step,
    help="Sequences behind one optimizer step.",
)
@click.option(
    "--rows-per-pass",
    type=WHOLE,
    default=TrainingConfig.rows_per_pass,
    help="Sequences in memory at once.",
)
@click.option("--muon-lr", type=POSITIVE, default=TrainingConfig.muon_lr)
@click.option("--adamw-lr", type=POSITIVE, default=TrainingConfig.adamw_lr)
@click.option("--weight-decay", type=click.FloatRange(min=0), default=TrainingConfig.weight_decay)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=TrainingConfig.dropout,
    help="Of what each layer adds: for a large decoder on little text.",
)
@click.option(
    "--decay-fraction",
    type=click.FloatRange(0, 1),
    default=TrainingConfig.decay_fraction,
    help="Last part of the run, in which the learning rates fall to zero.",
)
@click.option("--save-every", type=WHOLE, default=TrainingConfig.save_every, help="Steps between checkpoints.")
@click.option("--max-steps", type=WHOLE, help="Stop earlier than the end of the data.")
@click.option("--seed", default=1)
@click.option("--compile", is_flag=True, help="Compile the decoder first: a minute, then a third faster. Needs g++.")
@DEVICE
def train(
    datasets: tuple[str, ...],
    out: Path,
    data_root: Path | None,
    init: str | None,
    teachers: tuple[str, ...],
    twins: Path | None,
    patterns: Path | None,
    tokenizer: str | None,
    vocab_size: int,
    context: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp_width: int,
    rows_per_step: int,
    rows_per_pass: int,
    device: str,
    **settings: Any,
) -> None:
    """Train a storyteller, from the beginning or from another; run it again to go on after an interruption.

    With several GPUs: torchrun --nproc-per-node N -m model.cli train ...
    """
    from model.checkpoint import read_config
    from model.find import choose_device, find_model
    from model.training.data import PreparedData
    from model.training.loop import TrainingRun

    _check_one_tokenizer(init, tokenizer)
    if width % heads:
        raise InputError(f"--heads {heads} does not divide --width {width}.")
    initial = find_model(init, progress) if init else None
    taught_by = [find_model(teacher, progress) for teacher in teachers]
    others = [initial, *taught_by] if initial else taught_by
    context = min([context, *(read_config(other).max_position_embeddings for other in others)])
    tokenizer_of = find_model(tokenizer, progress) if tokenizer else next(iter(others), None)
    model_config = read_config(initial) if initial else None
    rank = int(os.environ.get("RANK", 0))
    data_folder = out / "data"
    while rank > 0 and not (data_folder / "data.json").is_file():
        time.sleep(1)  # process 0 prepares; data.json is the last file it writes
    _prepare_data(data_folder, datasets, data_root, tokenizer_of, context, vocab_size, settings["seed"])
    data = PreparedData.open(data_folder)
    try:
        model_config = model_config or ModelConfig(
            vocab_size=data.tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            max_position_embeddings=data.context,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    config = TrainingConfig(rows_per_step=rows_per_step, rows_per_pass=rows_per_pass, **settings)

    watched = rank == 0 and sys.stderr.isatty()
    with click.progressbar(length=1, file=sys.stderr, hidden=not watched, item_show_func=lambda text: text) as bar:

        def report(record: dict[str, Any]) -> None:
            bar.length = record["steps"]
            line = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tok/s"
            bar.update(record["step"] - bar.pos, line)
            if not watched and (record["step"] % 50 == 0 or "held_out_bits_per_byte" in record):
                score = record.get("held_out_bits_per_byte")
                shown = f", held-out {score:.4f} bits per byte" if score else ""
                for name, kind in (("held_out_choices", "held-out"), ("held_out_drawn_choices", "held-out drawn")):
                    shown += f", {record[name]:.1%} of {kind} choices right" if name in record else ""
                eta = f"{record['eta_s'] / 60:.0f} min left"
                click.echo(f"step {record['step']}/{record['steps']}: {line}{shown}, {eta}", err=True)

        device = choose_device(device)
        run = TrainingRun(out, data, model_config, config, device, report, initial, taught_by, twins, patterns)
        if rank == 0:
            progress(f"{model_config.n_parameters / 1e6:.1f} M parameters, {asdict(config)}")
        run.run()
    if rank == 0:
        click.echo(f"The storyteller is in {out / 'model'}: taleloom tell 'a shy dragon' --model {out / 'model'}")
