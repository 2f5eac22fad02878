"""What a method puts beside a merged tensor, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.formats import BYTES
from pymerge.in_memory.arrays import bytes_of, empty_like
from pymerge.methods.protocol import Extra, Tensor, Tile
from pymerge.ops.view import View


class TaskTensor(NamedTuple):
    """What makes of the base one tensor for each task t: element j is ``base + scales[t]·vector``
    where bit ``j % 8`` of ``masks[t, j // 8]`` is set, else the base's.

    ``masks`` is uint8 [num_tasks, ceil(n / 8)], ``scales`` float64 [num_tasks], as if the tensor
    were the whole model.
    """

    vector: Any
    masks: Any
    scales: Any


class Beside:
    """The memory of a tensor's extras."""

    def __init__(self, pattern: Any, tensor: Tensor, extras: Sequence[Extra]) -> None:
        self._pattern, self._format = pattern, tensor.format
        self._shapes = {each.suffix: each.shape_of(tensor) for each in extras if each.shape}
        self._arrays: dict[str, Any] = {}
        self._rows: list[tuple[bool, list[View]]] = []
        for extra in extras:
            shape = extra.shape_of(tensor)
            if extra.shape or shape is None:
                continue
            num_rows = tensor.num_models if extra.per_model else 1
            if extra.bits is None:
                array, whole = empty_like(pattern, shape, tensor.format)
                size = whole.num // num_rows
            else:
                array = np.zeros(shape, np.uint8)
                whole, size = View(array.ctypes.data, BYTES, array.size), shape[1]
            rows = [whole.part(row * size, size) for row in range(num_rows)]
            self._arrays[extra.suffix] = array
            self._rows.append((extra.bits is not None, rows))

    def views(self, tile: Tile) -> list[list[View]]:
        """The tile's part of the rows of each extra; it begins with a byte."""
        first, num_bytes = tile.start // 8, -(-tile.num // 8)
        return [
            [row.part(*((first, num_bytes) if bits else (tile.start, tile.num))) for row in rows]
            for bits, rows in self._rows
        ]

    def arrays(self, wholes: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
        """The extras by their suffix."""
        found = dict(self._arrays)
        for suffix, shape in self._shapes.items():
            if shape is not None:
                found[suffix], _ = empty_like(self._pattern, shape, self._format)
                bytes_of(found[suffix])[:] = wholes[suffix].reshape(-1).view(np.uint8)
        if isinstance(self._pattern, np.ndarray):
            return found
        import torch

        return {
            suffix: torch.from_numpy(array) if isinstance(array, np.ndarray) else array
            for suffix, array in found.items()
        }
