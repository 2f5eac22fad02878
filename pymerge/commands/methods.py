"""The merge methods and their parameters."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method with its parameters.", metavar="NAME")
    ] = None,
) -> None:
    """List the merge methods, or the parameters of one."""
    from pymerge.methods import METHODS, get_method
    from pymerge.terminal import print_method, print_methods

    if name is None:
        print_methods([entry.spec for entry in METHODS.values()])
    else:
        print_method(get_method(name).spec)
