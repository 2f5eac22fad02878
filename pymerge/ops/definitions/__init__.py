"""What an entry of the op table says; the entries stand here by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NumericsClass = Literal["bitwise", "rounded", "iterative"]

#: Every backend, in the order in which one is chosen.
BACKENDS = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Traffic:
    """What an op reads and writes of each element: whole arrays count, numbers per row do not.

    The fields name the arrays, "" where there is none; ``masks`` are bits, one per model. Calling
    it with the bytes of an element of the base (0 without one), of a model and of the output gives
    the bytes that one element of the tensor moves.
    """

    base: str = "base"
    models: str = "n × model"
    out: str = ""
    masks: str = ""

    def __call__(self, base_bytes: int, model_bytes: int, num_models: int, out_bytes: int) -> float:
        moved = base_bytes if self.base else 0
        moved += num_models * model_bytes if self.models else 0
        moved += out_bytes if self.out else 0
        return moved + num_models / 8 if self.masks else moved


@dataclass(frozen=True)
class Op:
    """One op.

    ``doc`` is its definition, in the terms of pymerge/ops/table.py. ``numerics``: bitwise ops give
    the same bytes on every backend, instruction set, thread count and tile size.
    """

    name: str
    signature: str
    doc: str
    traffic: Traffic
    numerics: NumericsClass = "bitwise"
    backends: tuple[str, ...] = BACKENDS


READS = Traffic()
READS_AND_WRITES = Traffic(out="output")
#: Of one model or input.
READS_ONE = Traffic(models="model")
MAPS_ONE = Traffic(models="model", out="output")
COPIES = Traffic(base="", models="input", out="output")
