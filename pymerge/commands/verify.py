"""Reread what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.errors import PymergeError


def verify(
    out: Annotated[Path, typer.Argument(help="Folder that pymerge wrote.", metavar="OUT")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print problems only.")] = False,
) -> None:
    """Reread a merged folder and compare every byte with the checksums of its manifest."""
    from pymerge import api
    from pymerge.sizes import format_size

    report = api.verify(out)
    for problem in report.problems:
        typer.echo(problem, err=True)
    if report.problems:
        raise PymergeError(f"{out} is damaged, see above")
    if not quiet:
        typer.echo(
            f"{out} is whole: {report.files_checked} files, {format_size(report.num_bytes)} checked"
        )
