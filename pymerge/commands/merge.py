"""Merge the models of a recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pymerge.commands.options import (
    BackendOption,
    Debug,
    MemoryOption,
    MissingOption,
    NumericsOption,
    PickleOption,
    RecipeArgument,
    ShardOption,
    StrictOption,
    ThreadsOption,
    TruncateOption,
    this_command,
)


def merge(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Output model folder.", metavar="OUT")],
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that OUT holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write a Chrome trace of each read, computation and write.",
        ),
    ] = None,
    non_finite: Annotated[
        str,
        typer.Option(
            "--non-finite",
            metavar="warn|fail",
            help="What NaN and infinite elements in the result mean.",
        ),
    ] = "warn",
    sync: Annotated[
        bool,
        typer.Option(
            "--sync/--no-sync",
            help="Make the output safe against power loss (fsync) before it counts as done.",
        ),
    ] = True,
    cache_output: Annotated[
        bool,
        typer.Option(
            "--cache-output",
            help="Leave the output in the page cache, for an evaluation that follows.",
        ),
    ] = False,
    read_method: Annotated[
        str | None,
        typer.Option(
            "--read-method",
            metavar="NAME",
            help="Force how inputs are read: dontcache, direct, buffered, plain.",
        ),
    ] = None,
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
    truncate_embeddings: TruncateOption = False,
    numerics: NumericsOption = "accurate",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT. Run it again to continue a stopped merge."""
    Debug.shown = Debug.shown or debug
    from pymerge import api

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
    run = partial(
        api.merge,
        planned,
        out,
        overwrite=overwrite,
        non_finite=non_finite,  # type: ignore[arg-type]
        sync=sync,
        cache_output=cache_output,
        read_method=read_method,
        trace=trace,
        resume_hint=this_command(),
    )
    if quiet:
        report = run()
        if report.nonfinite:
            text = f"warning: {len(report.nonfinite)} tensors hold non-finite elements"
            typer.echo(text, err=True)
        return
    from pymerge.terminal import Display, print_report, print_warnings

    print_warnings(planned.warnings)
    with Display() as display:
        report = run(progress=display.update)
    print_report(report)
    print_warnings(report.warnings[len(planned.warnings) :])
