"""Gram matrices, exact where a root or an inverse follows: squaring squares the condition, so a
float32 Gram loses singular values below 3e-4 of the largest, a float64 one none above 1e-7."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal

from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

Side = Literal["columns", "rows"]
Dtype = Literal["float64", "float32"]

#: Rows that are converted, or summed in float32, at a time.
CHUNK = 1024


def gram(x: torch.Tensor, ws: Workspace, *, side: Side, dtype: Dtype = "float64") -> torch.Tensor:
    """``xᵀ x`` (side="columns") or ``x xᵀ`` (side="rows"), symmetric to the bit.

    :param x: float32 [m, n].
    :param dtype: float64 multiplies in float64, exactly; float32 multiplies 1024 rows at a time in
        float32 and sums those in float64, for input below 1e15 in magnitude.
    :return: [c, c] in ``dtype``, c the columns or the rows. Input that is not finite gives
        elements that are not.
    """
    tall = _along(x, side)
    num, size = tall.shape
    # One chunk needs no sum.
    kind = "float32" if dtype == "float32" and num <= CHUNK else "float64"
    total = ws.empty(size, size, dtype=kind) if num else ws.zeros(size, size, dtype=kind)
    _add(total, tall, ws, None, single=dtype == "float32", fresh=True)
    return total if dtype == "float64" else total.float()


def gram_acc(
    total: torch.Tensor,
    x: torch.Tensor,
    ws: Workspace,
    *,
    side: Side = "columns",
    base: torch.Tensor | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> None:
    """Add the Gram matrix of ``x``, or of its difference to ``base``, to ``total``.

    :param total: float64 [c, c], symmetric; one triangle is added to and mirrored.
    :param x: bfloat16, float16 or float32 [m, n].
    :param base: of x's shape; the difference is taken in float32.
    :param backend: torch multiplies in float64; triton (kernels/gram.py) in float32, sums of 1024
        terms too, and those in float64, without a copy of the difference. If not given, triton on
        a GPU where it can run.
    :raises PymergeError: shapes do not fit; as BackendError: triton is asked for and cannot run.
    """
    tall = _along(x, side)
    size = tall.shape[1]
    if tuple(total.shape) != (size, size):
        raise PymergeError(
            f"gram_acc: expected total [{size}, {size}], found {list(total.shape)}; "
            f"give the Gram matrix of x's {side}"
        )
    if base is not None and base.shape != x.shape:
        raise PymergeError(
            f"gram_acc: expected base {list(x.shape)}, found {list(base.shape)}; "
            "give x and its base in one shape"
        )
    if backend != "torch" and (backend == "triton" or x.is_cuda):
        triton = importlib.import_module("pymerge.ops.triton")
        # An interpreter works on host memory, and only where it is asked for.
        if backend == "triton" or (triton.why_not() is None and not triton.emulated()):
            triton.gram_acc(total, x, side, base)
            return
    _add(total, tall, ws, None if base is None else _along(base, side), single=False)


def _along(x: torch.Tensor, side: Side) -> torch.Tensor:
    if x.dim() != 2:
        raise PymergeError(f"gram: expected a matrix, found {x.dim()} dimensions; reshape it first")
    return x if side == "columns" else x.t()


def _add(
    total: torch.Tensor,
    tall: torch.Tensor,
    ws: Workspace,
    base: torch.Tensor | None,
    *,
    single: bool,
    fresh: bool = False,
) -> None:
    """``fresh``: total holds nothing yet."""
    import torch

    num, size = tall.shape
    dtype = torch.float32 if single else torch.float64
    strips = ws.panels(size, 128 if ws.on_host and not single and size <= 1024 else None)

    def convert(part: slice) -> None:
        piece = tall[rows, part]
        if base is not None:
            piece = piece.float() - base[rows, part].float()
        chunk[:, part] = piece

    def strip(part: slice) -> None:
        out = total[part, part.start :]
        left, right = chunk[:, part].t(), chunk[:, part.start :]
        if out.dtype != dtype:
            out.copy_(left @ right) if first else out.add_(left @ right)
        else:
            out.addmm_(left, right, beta=0 if first else 1)

    def mirror(part: slice) -> None:
        total[part, part] = total[part, part].triu() + total[part, part].triu(1).t()
        total[part.stop :, part] = total[part, part.stop :].t()

    for rows in ws.panels(num, CHUNK if ws.on_host or single else None):
        first = fresh and rows.start == 0
        chunk = tall[rows]
        if base is not None or chunk.dtype != dtype:
            # In the layout of x: a transposed view is converted along its rows in memory.
            chunk = torch.empty_like(chunk, dtype=dtype)
            ws.map(convert, strips)
        ws.map(strip, strips)
    ws.map(mirror, strips)
