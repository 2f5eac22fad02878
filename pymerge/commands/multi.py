"""Merge the documents of a recipe that build on one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    this_command,
)


def multi(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Argument(help="Output folder of the document without a name.", metavar="OUT"),
    ] = None,
    intermediates: Annotated[
        Path | None,
        typer.Option(
            "--intermediates",
            "-I",
            metavar="DIR",
            help="Keep the output of every named document in DIR. Default: they are not written "
            "where the method allows that, else beside OUT for the time of the merge.",
        ),
    ] = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    shard_size: ShardOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace models that stand where outputs go.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
    numerics: NumericsOption = "accurate",
    truncate_embeddings: TruncateOption = False,
) -> None:
    """Merge a RECIPE of several documents, of which the later ones use the named ones as models."""
    from pymerge.multi import merge_documents

    planning: dict[str, Any] = {
        "memory": memory,
        "threads": threads,
        "shard_size": shard_size,
        "backend": backend,
        "strict": strict,
        "allow_pickle": allow_pickle,
        "allow_missing": allow_missing,
        "numerics": numerics,
        "truncate_embeddings": truncate_embeddings,
    }
    options: dict[str, Any] = {"overwrite": overwrite, "resume_hint": this_command()}
    if quiet:
        merge_documents(recipe, out, intermediates=intermediates, run=options, **planning)
        return
    from pymerge.terminal import Display, print_report, print_warnings

    with Display() as display:
        done = merge_documents(
            recipe,
            out,
            intermediates=intermediates,
            run={**options, "progress": display.update},
            **planning,
        )
    for name, report in done.reports.items():
        if report is None:
            typer.echo(f"{name}: made while it was read, never written")
            continue
        prefix = "" if name is None else f"{name}: "
        print_warnings([prefix + warning for warning in report.warnings])
        if name is not None and name in done.reasons:
            typer.echo(f"{name}: written for the time of the merge, since {done.reasons[name]}")
            continue
        print_report(report)
