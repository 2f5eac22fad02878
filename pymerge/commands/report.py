"""What a merge kept of its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pymerge.commands.options import MemoryOption, PickleOption, ThreadsOption
from pymerge.errors import StorageError


def report(
    out: Annotated[str, typer.Argument(help="Folder of a merged model.", metavar="OUT")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="The recipe of the merge. Default: the manifest's."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Where the base is now, or one to take."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="MODEL",
            help="Where the other models are now, in the recipe's order; once for each.",
        ),
    ] = None,
    no_recipe: Annotated[
        bool,
        typer.Option("--no-recipe", help="Compare with --base and --models by names alone."),
    ] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Print every tensor, not layers.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for the output.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with plots.")
    ] = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    allow_pickle: PickleOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Measure a merged model against its base and its experts: norms, cosines, sign conflicts.

    Every tensor is read, of the output and of its inputs.
    """
    from pymerge.report.html import html_page
    from pymerge.report.tables import print_survey, survey_data
    from pymerge.surveys import survey
    from pymerge.terminal import Display, output_console, print_warnings

    for path in (json_file, html_file):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise StorageError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    with Display() as display:
        found = survey(
            out,
            recipe=recipe,
            base=base,
            models=models or (),
            use_recipe=not no_recipe,
            memory=memory,
            threads=threads,
            allow_pickle=allow_pickle,
            progress=None if quiet else display.update,
        )
    print_warnings(found.warnings)
    text = json.dumps(survey_data(found), indent=1, allow_nan=False, ensure_ascii=False)
    if html_file is not None:
        _write(html_file, html_page(found))
    if json_file is not None and str(json_file) == "-":
        typer.echo(text)
        return
    if json_file is not None:
        _write(json_file, text + "\n")
    if not quiet:
        print_survey(found, output_console(), every_tensor=tensors)
        for path in filter(None, (json_file, html_file)):
            typer.echo(f"written: {path}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; choose another file") from error
