"""Under which names, and in how many parts, a checkpoint holds a tensor that transformers calls
otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pymerge.checkpoint import TensorEntry
from pymerge.checkpoint.parts import joined

#: A stand-in's size along each axis: two, so that turning it changes the order of its elements.
_SIDE = 2


class Renaming:
    """mergekit's conversion of one checkpoint's names, tried out on small stand-ins.

    Each stored tensor is stood for by one of as many axes with numbers that nothing else has. Where
    the numbers of what the conversion makes come in the order of some stand-ins, one after another,
    the tensor is those tensors' elements one after another.
    """

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        import torch

        self._tensors = list(tensors.values())
        self._stand_ins = {}
        self._starts = {}
        first = 0
        for number, entry in enumerate(self._tensors):
            axes = len(entry.shape)
            numbers = torch.arange(first, first + _SIDE**axes, dtype=torch.int64)
            self._stand_ins[entry.name] = numbers.reshape((_SIDE,) * axes)
            self._starts[first] = number
            first += _SIDE**axes

    def find(self, load: Any) -> TensorEntry | None:
        """What a loading task of mergekit's asks for; None where it is not in the checkpoint, or is
        made otherwise than by joining tensors of one shape."""
        from mergekit.architecture.conversion import convert_checkpoint_tensors
        from mergekit.io.tasks import LoaderCache

        trusted = LoaderCache().trust_remote_code
        model_type = load.model.config(trust_remote_code=trusted).model_type
        for target in (load.tensor, *(load.aliases or ())):
            try:
                made = convert_checkpoint_tensors(model_type, self._stand_ins, target)
            # What transformers' conversions raise for shapes that they do not expect is not
            # documented; then the tensor is made otherwise.
            except Exception:
                return None
            if made is not None:
                return self._read_off(load.tensor, made)
        return None

    def _read_off(self, name: str, made: Any) -> TensorEntry | None:
        numbers = made.reshape(-1).tolist()
        parts = []
        position = 0
        while position < len(numbers):
            number = self._starts.get(numbers[position])
            if number is None:
                return None
            entry = self._tensors[number]
            size = _SIDE ** len(entry.shape)
            expected = list(range(numbers[position], numbers[position] + size))
            if numbers[position : position + size] != expected:
                return None
            parts.append(entry)
            position += size
        if len(parts) == 1 and made.dim() == len(parts[0].shape):
            return parts[0]
        if not parts or len({(entry.shape, entry.format) for entry in parts}) > 1:
            return None
        axes = len(parts[0].shape)
        outer, inner = made.shape[: made.dim() - axes], made.shape[made.dim() - axes :]
        sizes = zip(inner, parts[0].shape, strict=True)
        shape = (*outer, *(real * side // _SIDE for side, real in sizes))
        if math.prod(shape) != sum(entry.num_elements for entry in parts):
            return None
        return joined(name, shape, parts)
