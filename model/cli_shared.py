"""What the commands' files share: options of several of them, and saying what takes a moment."""

from __future__ import annotations

import sys
from pathlib import Path

import click

WHOLE = click.IntRange(min=1)
FILE = click.Path(path_type=Path)
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def progress(message: str) -> None:
    """Say on standard error, when somebody is watching, what takes a moment."""
    if sys.stderr.isatty():
        click.echo(message, err=True)
