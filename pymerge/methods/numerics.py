"""In which numbers a merge computes.

``accurate`` computes in float32 throughout and rounds once at the end. ``mergekit`` rounds every
intermediate in the working format, as mergekit does, so that results equal its own: a second form
of each of its methods, in ``methods/stepwise``.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from pymerge.errors import RecipeError
from pymerge.methods.protocol import Method
from pymerge.methods.registry import get_method
from pymerge.names import listed, shown

Numerics = Literal["accurate", "mergekit"]


def backend_in(numerics: Numerics, asked: str | None) -> str | None:
    """The backend to ask for: mergekit's bits come from torch's operators on the host, whatever
    else could run here."""
    if asked is None and numerics == "mergekit" and not os.environ.get("PYMERGE_BACKEND"):
        return "cpu"
    return asked


def method_in(name: str, numerics: Numerics) -> Method:
    """The method called ``name`` in these numerics.

    :raises RecipeError: there is no such method, or mergekit has none of that name.
    """
    if numerics == "accurate":
        return get_method(name)
    if numerics != "mergekit":
        raise RecipeError(
            f"numerics: expected {listed(get_args(Numerics))}, found {shown(numerics)}"
        )
    from pymerge.methods.stepwise import stepwise_method

    return stepwise_method(name)
