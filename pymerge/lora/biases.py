"""The biases of modules that have factors.

Where one of them changed there are two ways to write them. With ``lora_bias`` PEFT gives every
module's B a bias, and merges only where every module has a bias of its own; and embeddings can have
none. Else the biases themselves are written, as PEFT does with bias="all".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pymerge.checkpoint import OutputTensor
from pymerge.checkpoint.adapter import PREFIX
from pymerge.formats import F64, Format
from pymerge.lora.modules import LowRankModule
from pymerge.lora.read import Bytes, difference, equal, pieces, refuse_non_finite, rounded


class Biases:
    """Which biases changed, and how they are written."""

    def __init__(self, modules: Sequence[LowRankModule]) -> None:
        self.changed = {module.name for module in modules if _has_changed(module)}

    def differences(self, chosen: Sequence[LowRankModule]) -> bool:
        """Whether they are written as ``lora_bias``."""
        if not self.changed:
            return False
        return all("bias" in each.parts and each.kind != "embedding" for each in chosen)

    def largest(self, modules: Sequence[LowRankModule]) -> list[OutputTensor]:
        """A tensor at least as large as any that comes, for each module that may have one."""
        return [
            OutputTensor(
                f"{PREFIX}{module.name}.base_layer.lora_B.bias",
                F64,
                module.parts["bias"].model.shape,
            )
            for module in modules
            if self.changed and "bias" in module.parts
        ]

    def tensors(
        self, chosen: Sequence[LowRankModule], format: Format
    ) -> Iterator[tuple[OutputTensor, Iterable[Bytes]]]:
        """Raises StorageError, and CheckpointError for biases that are not finite."""
        if not self.changed:
            return
        as_difference = self.differences(chosen)
        for module in chosen:
            pair = module.parts.get("bias")
            if pair is None or pair.base is None:
                continue
            if as_difference:
                delta = difference(pair.model, pair.base)
                refuse_non_finite(pair.model, delta, "changes of biases")
                if module.name not in self.changed:
                    delta = np.zeros_like(delta)
                name = f"{PREFIX}{module.name}.lora_B.bias"
                yield OutputTensor(name, format, delta.shape), [rounded(delta, format, name)]
            elif module.name in self.changed:
                name = f"{PREFIX}{module.name}.base_layer.bias"
                entry = pair.model
                yield OutputTensor(name, entry.format, entry.shape), pieces(entry)


def _has_changed(module: LowRankModule) -> bool:
    pair = module.parts.get("bias")
    return pair is not None and (pair.base is None or not equal(pair.model, pair.base))
