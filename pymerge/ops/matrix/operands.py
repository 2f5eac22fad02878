"""What the matrix ops ask of their operands."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch


def matrix(op: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a matrix of float32 or float64."""
    if tensor.dim() != 2:
        raise PymergeError(f"{op}: {name} has {tensor.dim()} dimensions, expected a matrix")
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in ("float32", "float64"):
        raise PymergeError(f"{op}: {name} is {kind}, expected float32 or float64")
    return tensor.shape[0], tensor.shape[1]


def square(op: str, name: str, tensor: torch.Tensor) -> int:
    """The order of a square matrix."""
    rows, columns = matrix(op, name, tensor)
    if rows != columns:
        raise PymergeError(f"{op}: {name} is {rows} x {columns}, expected a square matrix")
    return rows


def shaped(op: str, name: str, tensor: torch.Tensor, rows: int, columns: int) -> None:
    """A matrix of a given shape."""
    found = matrix(op, name, tensor)
    if found != (rows, columns):
        raise PymergeError(
            f"{op}: {name} is {found[0]} x {found[1]}, expected {rows} x {columns} "
            "to fit the other operands"
        )


def alike(op: str, **tensors: torch.Tensor) -> None:
    """Matrices of one dtype."""
    kinds = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise PymergeError(f"{op}: expected matrices of one type, found {listed}; convert them")


def at_least_zero(op: str, name: str, value: float) -> float:
    """A finite number that is not negative."""
    if not math.isfinite(value) or value < 0:
        raise PymergeError(f"{op}: {name} is {value}, expected a finite number, zero or more")
    return float(value)
