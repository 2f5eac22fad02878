"""Small models, trained and merged with every method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for models, plot and results.")
    ] = Path("demo"),
) -> None:
    """Train small models on scikit-learn's digits, merge them with every method, print a table."""
    from rich.console import Console

    from pymerge.demo import run_demo

    run_demo(out, Console())
