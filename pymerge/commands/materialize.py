"""One task of a multi-task folder as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pymerge.commands.options import (
    BackendOption,
    MemoryOption,
    ShardOption,
    ThreadsOption,
    this_command,
)


def materialize(
    out: Annotated[Path, typer.Argument(help="Folder merged by emr or tall_masks.", metavar="OUT")],
    task: Annotated[
        str,
        typer.Argument(
            help="The task: its model in the recipe, its number from 0, or a part of the name.",
            metavar="TASK",
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="Output model folder.", metavar="DEST")],
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that DEST holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    backend: BackendOption = None,
) -> None:
    """Write the model of one TASK of the multi-task folder OUT as a model of its own."""
    from pymerge.runtime.materialize import materialize as run
    from pymerge.terminal import Display, print_report

    options: dict[str, Any] = {
        "memory": memory,
        "threads": threads,
        "shard_size": shard_size,
        "backend": backend,
        "overwrite": overwrite,
        "resume_hint": this_command(),
    }
    if quiet:
        run(out, task, dest, **options)
        return
    with Display() as display:
        report = run(out, task, dest, progress=display.update, **options)
    print_report(report)
