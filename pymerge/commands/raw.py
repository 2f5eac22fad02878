"""Merge bare files of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.commands.options import (
    BackendOption,
    MemoryOption,
    NumericsOption,
    PickleOption,
    RecipeArgument,
    StrictOption,
    ThreadsOption,
    this_command,
)
from pymerge.errors import PymergeError


def raw(
    recipe: RecipeArgument,
    out: Annotated[
        Path, typer.Argument(help="Output file, its name ends in .safetensors.", metavar="OUT_FILE")
    ],
    tensor_intersection: Annotated[
        bool,
        typer.Option("--tensor-intersection", "-i", help="Merge the tensors that all files have."),
    ] = False,
    tensor_union: Annotated[
        bool,
        typer.Option(
            "--tensor-union", "-u", help="Merge every tensor from the files that have it."
        ),
    ] = False,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT_FILE if it exists.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    numerics: NumericsOption = "accurate",
    random_seed: Annotated[
        int | None,
        typer.Option("--random-seed", metavar="N", help="Seed of the random methods."),
    ] = None,
) -> None:
    """Merge single files of weights by tensor names into OUT_FILE, without config or tokenizer.

    RECIPE has merge_method, models (files), base_model, parameters, dtype and out_dtype. Without
    -i or -u all files must have the same tensor names.
    """
    from pymerge.raw import merge_raw, plan_raw
    from pymerge.terminal import Display, print_report, print_warnings

    if tensor_intersection and tensor_union:
        raise PymergeError("expected at most one of --tensor-intersection and --tensor-union")
    planned = plan_raw(
        recipe,
        names="intersection" if tensor_intersection else "union" if tensor_union else "same",
        memory=memory,
        threads=threads,
        backend=backend,
        strict=strict,
        allow_pickle=allow_pickle,
        numerics=numerics,  # type: ignore[arg-type]
        random_seed=random_seed,
    )
    if quiet:
        report = merge_raw(planned, out, overwrite=overwrite, run={"resume_hint": this_command()})
        if report.nonfinite:
            text = f"warning: {len(report.nonfinite)} tensors hold non-finite elements"
            typer.echo(text, err=True)
        return
    print_warnings(planned.warnings)
    with Display() as display:
        run = {"progress": display.update, "resume_hint": this_command()}
        report = merge_raw(planned, out, overwrite=overwrite, run=run)
    print_report(report)
    print_warnings(report.warnings[len(planned.warnings) :])
