"""What is available on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pymerge.errors import PymergeError


def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure storage (64 MiB), memory and matrix products."),
    ] = False,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Folder whose storage is examined.")
    ] = Path("."),
) -> None:
    """Tell what is available on this machine, and why the rest is not."""
    from pymerge.doctor import examine

    report = examine(folder)
    for line in report.lines():
        typer.echo(line)
    if measure:
        from pymerge.engine.rates import existing_parent, measure_rates
        from pymerge.sizes import format_size

        rates = measure_rates(existing_parent(folder))
        typer.echo(
            f"measured: device read {format_size(rates.read)}/s, cached read "
            f"{format_size(rates.cached_read)}/s, durable write "
            f"{format_size(rates.write)}/s, memory copy "
            f"{format_size(rates.copy)}/s"
        )
        from pymerge.engine.matrix_rates import measure_matrix_rates
        from pymerge.machine import compute_threads

        threads = compute_threads(None)
        matrices = measure_matrix_rates(threads)
        typer.echo(
            f"measured: matrix products {matrices.flops32:.3g} flops/s in float32 and "
            f"{matrices.flops64:.3g} in float64 with {threads} threads, eigenproblems "
            f"{matrices.eigen64:.3g} with one"
        )
    if report.problems:
        raise PymergeError("pymerge cannot merge here; the problems are listed above")
