"""Merge ops on raw memory: measure and apply steps of every method, framework-free.

The functions here run on the CPU backend. ``dispatch.choose`` picks among backends, ``reference``
is the truth in plain numpy, ``table.OPS`` documents each op. Importing this never fails for want of
the extension; using it does.
"""

from pymerge.ops import dispatch, reference
from pymerge.ops.cpu import (
    available_isas,
    axpy_n,
    bracket_count,
    convert,
    count_nonfinite,
    disjoint_merge,
    isa,
    locate_equal,
    magnitude_histogram,
    magnitude_sample,
    use_isa,
)
from pymerge.ops.dispatch import choose
from pymerge.ops.table import OPS, TRAFFIC
from pymerge.ops.view import View, view

__all__ = [
    "OPS",
    "TRAFFIC",
    "View",
    "available_isas",
    "axpy_n",
    "bracket_count",
    "choose",
    "convert",
    "count_nonfinite",
    "disjoint_merge",
    "dispatch",
    "isa",
    "locate_equal",
    "magnitude_histogram",
    "magnitude_sample",
    "reference",
    "use_isa",
    "view",
]
