"""Symmetric positive (semi-)definite systems: (A + ridge mean(diag A) I) X = B by Cholesky.

Numerics class: iterative; the bound is on the residual that is reported. One factorisation, one
step of refinement, no inverse. A Gram matrix of few samples is singular up to rounding: where the
factorisation fails in float32 it is tried in float64, and where it fails there the ridge is
multiplied by ten, which the result reports.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pymerge.errors import PymergeError
from pymerge.ops.matrix import operands

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Columns of the right-hand side that are solved at a time.
COLUMNS = 256
#: A matrix that needs a larger ridge than this, relative to its mean diagonal, is not what rounding
#: made of a positive semi-definite one.
LARGEST_RIDGE = 1.0


class Solution(NamedTuple):
    """What solve_spd found."""

    #: [n, k], of the operands' type.
    x: torch.Tensor
    #: The ridge that was used, relative to the mean of the diagonal: the one asked for or larger.
    ridge: float
    #: ||B - (A + ridge mean(diag A) I) X||_F / ||B||_F, 0 where B is 0.
    residual: float


def solve_spd(a: torch.Tensor, b: torch.Tensor, ws: Workspace, *, ridge: float = 0.0) -> Solution:
    """X of (A + ridge mean(diag A) I) X = B.

    :param a: [n, n], symmetric positive semi-definite up to rounding, float32 or float64; only its
        lower triangle is factorised.
    :param b: [n, k] of the same type.
    :param ridge: relative to the mean of the diagonal; where it is too small to factorise, it grows
        in steps of ten.
    :returns: X = 0 for A = 0, and NaN where A is not finite.
    :raises PymergeError: shapes, types or the ridge do not fit, or A is far from positive
        semi-definite.
    """
    import torch

    op = "solve_spd"
    n = operands.square(op, "a", a)
    operands.shaped(op, "b", b, n, operands.matrix(op, "b", b)[1])
    operands.alike(op, a=a, b=b)
    ridge = operands.at_least_zero(op, "ridge", ridge)
    if n == 0:
        return Solution(torch.empty_like(b), ridge, 0.0)
    mean = float(a.diagonal().double().mean())
    if not (math.isfinite(mean) and all(ws.map(lambda p: _finite(a[p]), ws.panels(n)))):
        return Solution(torch.full_like(b, math.nan), ridge, math.nan)
    if mean == 0 and not any(ws.map(lambda p: bool(a[p].any()), ws.panels(n))):
        x = torch.zeros_like(b)
        return Solution(x, ridge, _residual([_squares(b)], [_squares(b)]))
    factor, used = _factorise(a, mean, ridge)
    shift = used * mean
    x = torch.empty_like(b)

    def tile(columns: slice) -> tuple[float, float]:
        right = b[:, columns].to(factor.dtype)
        found = _substitute(factor, right)
        found += _substitute(factor, _defect(a, shift, found, right, ws))
        x[:, columns] = found
        return _squares(_defect(a, shift, found, right, ws)), _squares(right)

    norms = ws.map(tile, ws.panels(b.shape[1], COLUMNS))
    return Solution(x, used, _residual([left for left, _ in norms], [all_ for _, all_ in norms]))


def _factorise(a: torch.Tensor, mean: float, ridge: float) -> tuple[torch.Tensor, float]:
    """The lower Cholesky factor, and the ridge that it took."""
    import torch

    least = torch.finfo(a.dtype).eps
    kind, used = a.dtype, ridge
    while True:
        factor, is_whole = cholesky(a, used * mean, kind)
        if is_whole and _finite(factor.diagonal()):
            return factor, used
        del factor
        if kind != torch.float64:
            kind = torch.float64
            continue
        used = max(10 * used, least)
        if used > LARGEST_RIDGE or mean <= 0:
            raise PymergeError(
                f"solve_spd: expected a positive semi-definite matrix, found one that a ridge of "
                f"{LARGEST_RIDGE} times its mean diagonal, which is {mean:.3g}, does not mend; "
                "check the inputs that it was measured from"
            )


def cholesky(
    a: torch.Tensor, shift: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, bool]:
    """The lower Cholesky factor of ``a + shift I``, computed where the one copy of ``a`` is, and
    whether there is one."""
    import torch

    # LAPACK takes columns: the copy lies in them, or torch would make another.
    turned = a.mT.to(dtype or a.dtype, copy=True, memory_format=torch.contiguous_format)
    shifted = turned.mT
    shifted.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(shifted, out=(shifted, info))
    return shifted, int(info) == 0


def _substitute(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    import torch

    half = torch.linalg.solve_triangular(factor, right, upper=False)
    whole: torch.Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole


def _defect(
    a: torch.Tensor, shift: float, x: torch.Tensor, right: torch.Tensor, ws: Workspace
) -> torch.Tensor:
    """B - (A + shift I) X; A is widened by panels where the factor is wider."""
    out = right.sub(x, alpha=shift)
    for rows in ws.panels(a.shape[0]):
        out[rows].addmm_(a[rows].to(x.dtype), x, alpha=-1)
    return out


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _residual(left: list[float], whole: list[float]) -> float:
    total = math.fsum(whole) if all(map(math.isfinite, whole)) else math.nan
    if total == 0:
        return 0.0
    return math.sqrt(sum(left) / total)
