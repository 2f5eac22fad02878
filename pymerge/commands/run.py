"""Run a command of another program with pymerge as its engine."""

from __future__ import annotations

from typing import Annotated

import typer

from pymerge.commands.options import (
    BackendOption,
    MemoryOption,
    NumericsOption,
    ThreadsOption,
)
from pymerge.commands.running import leave

#: How the command reads its arguments: what follows the other program's name is that program's.
RUN_SETTINGS = {"allow_interspersed_args": False}


def run(
    command: Annotated[
        list[str],
        typer.Argument(
            help="A command of mergekit with its arguments, as in: -- mergekit-yaml CONFIG OUT.",
            metavar="COMMAND ...",
        ),
    ],
    numerics: NumericsOption = "accurate",
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run with a version of mergekit that is not known."),
    ] = False,
) -> None:
    """Run mergekit-yaml, mergekit-multi or mergekit-pytorch with pymerge as the engine."""
    from pymerge.integrations.mergekit_command import run_command

    try:
        run_command(
            command,
            numerics=numerics,
            memory=memory,
            threads=threads,
            backend=backend,
            force=force,
        )
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise
        leave(stop.code or 0)
