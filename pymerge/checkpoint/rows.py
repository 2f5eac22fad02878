"""Tensors whose rows are put together of the rows of others, for another vocabulary."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint.derived import DerivedTensor
from pymerge.checkpoint.header import TensorEntry
from pymerge.formats import Format

#: What stands for a stored tensor where a row comes from none: zeros, the mean of rows of several
#: tensors, and the mean of all rows of this tensor that come from somewhere.
ZERO, MEAN, PAD = -1, -2, -3


@dataclass(frozen=True, eq=False)
class RowsTensor(DerivedTensor):
    """Row i is row ``rows[i]`` of stored tensor ``origins[i]``, both [rows].

    With the origin MEAN it is the mean of the rows in ``means[rows[i]]``, [means, stored], of which
    those below 0 do not count. Elements of other formats are converted to ``format``. Means are
    those of float32 numbers (float64 for a float64 ``format``), rounded once; with ``stepwise`` in
    ``format`` from step to step.
    """

    origins: NDArray[np.int16] = field(repr=False)
    rows: NDArray[np.int32] = field(repr=False)
    means: NDArray[np.int32] = field(repr=False)
    stepwise: bool = False

    @property
    def row_elements(self) -> int:
        return self.num_elements // max(1, self.shape[0])

    @property
    def scratch_blocks(self) -> int:
        """One to read rows into, and what making these takes where they are made themselves."""
        return 1 + max(
            (each.scratch_blocks for each in self.stored if isinstance(each, DerivedTensor)),
            default=0,
        )

    @property
    def read_bytes(self) -> int:
        """Of each stored tensor the rows that are taken."""
        times = 2 if np.any(self.origins == PAD) else 1
        taken = [int(np.count_nonzero(self.origins == n)) for n in range(len(self.stored))]
        widths = [self.row_elements * each.format.bits // 8 for each in self.stored]
        return times * sum(num * width for num, width in zip(taken, widths, strict=True))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.origins, self.rows, self.means):
            digest.update(np.ascontiguousarray(array).tobytes())
        kind = [self.format.name, list(self.means.shape), self.stepwise, digest.hexdigest()]
        return json.dumps(kind)


def rows_tensor(
    entry: TensorEntry,
    stored: tuple[TensorEntry, ...],
    format: Format,
    nominal: Format,
    *,
    origins: NDArray[np.int16],
    rows: NDArray[np.int32],
    means: NDArray[np.int32],
    stepwise: bool = False,
) -> RowsTensor:
    """``entry`` with other rows; the arguments are the fields of :class:`RowsTensor`."""
    shape = (len(rows), *entry.shape[1:])
    num_elements = int(np.prod(shape, dtype=np.int64))
    return RowsTensor(
        entry.name,
        format,
        shape,
        stored[0].file,
        stored[0].offset,
        num_elements * format.num_bytes,
        stored,
        nominal,
        origins,
        rows,
        means,
        stepwise,
    )
