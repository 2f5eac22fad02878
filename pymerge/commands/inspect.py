"""What a checkpoint holds."""

from __future__ import annotations

from typing import Annotated

import typer

from pymerge.commands.options import PickleOption


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="Model folder, file or hub id.", metavar="CKPT")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read the data too and count non-finite elements.")
    ] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """List the tensors of a checkpoint, as its validated headers give them."""
    from pymerge.checkpoint import open_checkpoint
    from pymerge.terminal import print_checkpoint

    opened = open_checkpoint(checkpoint, allow_pickle=allow_pickle)
    counts = None
    if check:
        from pymerge.engine.scan import count_nonfinite

        counts = count_nonfinite(opened)
    print_checkpoint(opened, counts, as_json=as_json)
    if not as_json:
        from pymerge.runtime.smile_folder import is_smile_folder, open_smile
        from pymerge.runtime.task_folder import is_task_folder, open_tasks

        if is_smile_folder(opened):
            upscaled = open_smile(checkpoint)
            experts = ", ".join(f"{i}: {name}" for i, name in enumerate(upscaled.experts))
            typer.echo(
                f"with experts beside {len(upscaled.modules)} layers by smile; experts {experts}"
            )
            typer.echo("pymerge.load_smile gives the model with them in Python")
        if is_task_folder(opened):
            folder = open_tasks(checkpoint)
            names = ", ".join(f"{task.number}: {task.name}" for task in folder.tasks)
            typer.echo(f"with a model for each task by {folder.method}; tasks {names}")
            typer.echo("pymerge materialize OUT TASK DEST writes one of them")
