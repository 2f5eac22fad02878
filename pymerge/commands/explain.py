"""What a recipe means for each tensor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pymerge.commands.options import (
    BackendOption,
    MemoryOption,
    MissingOption,
    NumericsOption,
    PickleOption,
    RecipeArgument,
    StrictOption,
    ThreadsOption,
    TruncateOption,
)


def explain(
    recipe: RecipeArgument,
    tensor: Annotated[
        str | None,
        typer.Argument(
            help="Name of an output tensor, or a part of some. Default: all.", metavar="TENSOR"
        ),
    ] = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help="Show every tensor by itself, not in groups.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    backend: BackendOption = None,
    strict: StrictOption = False,
    allow_pickle: PickleOption = False,
    allow_missing: MissingOption = False,
    numerics: NumericsOption = "accurate",
    truncate_embeddings: TruncateOption = False,
) -> None:
    """Explain what RECIPE does to TENSOR: parameters and where they come from, inputs, cost.

    Of the models only headers are read.
    """
    from pymerge import api
    from pymerge.report.explanation import explanation_data, print_explanation

    explanation = api.explain(
        recipe,
        tensor,
        memory=memory,
        threads=threads,
        backend=backend,
        strict=strict,
        allow_pickle=allow_pickle,
        allow_missing=allow_missing,
        numerics=numerics,
        truncate_embeddings=truncate_embeddings,
    )
    if as_json:
        typer.echo(json.dumps(explanation_data(explanation), indent=2))
        return
    from pymerge.terminal import output_console, print_warnings

    print_warnings(explanation.warnings)
    print_explanation(explanation, output_console(), every_tensor=all_tensors)
