"""The op table: what each op computes and moves, how exact it is, which backends offer it.

Shared definitions. An input is a View of raw elements. value(x) is the float32 of an element, exact
for every format but float64, which rounds to nearest even. delta_i = value(x_i) - value(base) in
float32; where an op allows ``base=None`` it is value(x_i). The key of a delta is the int32 bit
pattern of its magnitude, every NaN as 0x7fc00000: keys order like magnitudes, with NaN above
infinity, and -0 has key 0. The index e of an element is ``start`` plus its place in the view: its
place in the full tensor, so that a tile gives what the whole would. A Keep (selection.py) decides
by key and index what is kept of a model; the draw of an index is defined there too.

Arithmetic is float32 without contraction, models in the given order, one rounding to nearest even
into the output's format. Every NaN is stored as the positive quiet NaN. Ops that write an ``out``
return how many elements are not finite after rounding. exp, log and tanh are the fixed sequences of
float32 operations in reference/elementary.py.

Span sums are float64, one for each ``span`` elements from the first, the last span shorter: 64
lanes, lane l adding the elements l, l + 64, ... of the span in order, then lane l adds lane l + 32,
then 16, 8, 4, 2, 1; a NaN is given as the positive quiet one. Tiles that begin at multiples of the
span give the sums of the whole.

Outputs must not overlap inputs (adam_step alone updates in place); memory may be misaligned. Ops on
whole rows take a number of elements that ``columns`` divides. Wrong arguments raise PymergeError
(arguments/).
"""

from __future__ import annotations

from pymerge.ops.definitions import BACKENDS, NumericsClass, Op, Traffic
from pymerge.ops.definitions.elementwise import ELEMENTWISE
from pymerge.ops.definitions.merge import MERGE
from pymerge.ops.definitions.rows import ROWS
from pymerge.ops.definitions.selection import SELECTION

__all__ = ["BACKENDS", "OPS", "TRAFFIC", "NumericsClass", "Op", "Traffic"]

OPS: dict[str, Op] = {op.name: op for op in (*MERGE, *SELECTION, *ROWS, *ELEMENTWISE)}

#: Bytes read and written per element, by op: ``TRAFFIC["axpy_n"](base_bytes, model_bytes,
#: num_models, out_bytes)``.
TRAFFIC: dict[str, Traffic] = {name: op.traffic for name, op in OPS.items()}
