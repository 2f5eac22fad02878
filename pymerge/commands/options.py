"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    Path, typer.Argument(help="Recipe in mergekit's YAML dialect.", metavar="RECIPE")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB. Default: half of what is available.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Compute threads. Default: all CPUs."),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard-size", metavar="SIZE", help="Largest output file. Default: 5GB."),
]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="Demand a backend instead of the best one."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, ...")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Treat warnings about the recipe as errors.")
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Accept .bin files, read by torch.load(weights_only=True)."
    ),
]
MissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Merge a tensor without the models that lack it."),
]

TruncateOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-truncate-embeddings",
        help="Merge the rows that all vocabularies have; right only where ids mean the same.",
    ),
]
NumericsOption = Annotated[
    str,
    typer.Option(
        "--numerics",
        metavar="accurate|mergekit",
        help="Compute in float32 and round once, or round every step as mergekit does.",
    ),
]


def this_command() -> str:
    """The command line as it was given, for the message of an interruption."""
    return f"run {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


class Debug:
    """Whether an error shows its traceback; set by ``--debug``."""

    shown = False
