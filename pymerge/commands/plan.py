"""What a merge will do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.commands.options import (
    BackendOption,
    MemoryOption,
    MissingOption,
    NumericsOption,
    PickleOption,
    RecipeArgument,
    ShardOption,
    StrictOption,
    ThreadsOption,
    TruncateOption,
)


def plan(
    recipe: RecipeArgument,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every output tensor.")] = False,
    folder: Annotated[
        Path,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="Folder whose storage the floor is estimated for, on a scratch file.",
        ),
    ] = Path("."),
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
    truncate_embeddings: TruncateOption = False,
    numerics: NumericsOption = "accurate",
) -> None:
    """Print what a merge will do: jobs, bytes, memory, backends, time floor.

    Of the models only headers are read.
    """
    from pymerge import api
    from pymerge.engine.matrix_rates import matrix_rates_of
    from pymerge.engine.rates import rates_of
    from pymerge.terminal import print_plan

    planned = api.plan(
        recipe,
        memory=memory,
        threads=threads,
        shard_size=shard_size,
        backend=backend,
        strict=strict,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
        truncate_embeddings=truncate_embeddings,
        numerics=numerics,  # type: ignore[arg-type]
    )
    rates = rates_of(folder)
    print_plan(planned, rates, matrix_rates_of(planned), as_json=as_json, tensors=tensors)
