"""The polar factor of a matrix: U Vᵀ of its singular value decomposition, without computing one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pymerge.errors import PymergeError
from pymerge.ops.matrix.approximants import quintic, zolotarev
from pymerge.ops.matrix.gram import gram
from pymerge.ops.matrix.products import product
from pymerge.ops.matrix.solve import cholesky
from pymerge.ops.matrix.spectrum import SEED, gram_eigh, power_of_two

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

Route = Literal["auto", "gram", "qdwh", "iterate"]

#: Short sides up to which an eigendecomposition is the fastest route.
SMALL = 128
#: The smallest relative singular value that is tried before the cut.
FLOOR = 1e-4
#: Where the iterate route assumes the smallest relative singular value.
ITERATE_FLOOR = 1e-3
#: ‖PᵀP − 1‖_F / √rank at which the iterations end.
CONVERGED = 1e-6


class Polar(NamedTuple):
    """``factor`` float32 like x, a partial isometry of ``rank``; ``nuclear`` is the sum of the
    singular values kept, ``residual`` a bound on ‖PᵀP − Q‖_F / √rank with Q the projection on P's
    rows, rounding to float32 aside."""

    factor: torch.Tensor
    rank: int
    nuclear: float
    residual: float


def polar(x: torch.Tensor, ws: Workspace, *, cut: float = 1e-6, route: Route = "auto") -> Polar:
    """The polar factor U Vᵀ of ``x``; singular values below ``cut`` times the largest do not count,
    their directions are 0 in the factor.

    Routes:

    - gram: float64 eigenvectors of the Gram matrix of the short side. Always works.
    - qdwh: the first step is Zolotarev's rational function of the float64 Gram matrix, by Cholesky
      (Nakatsukasa and Freund, SIAM Review 58, 2016), and leaves a condition number of a few; then
      minimax quintics and Newton-Schulz in float32. A Cholesky factorisation certifies that no
      singular value is below the cut; where it fails the route is gram.
    - iterate: products alone, in float32 (Polar Express, arXiv 2505.16932) from a guaranteed bound
      on the largest singular value, for condition numbers up to 1e4; gram where it does not
      converge. Its error grows as the condition number times 3e-8.

    :param x: float32 [m, n].
    :param cut: at least 1e-6: the Gram matrix holds no less.
    :param route: auto is qdwh, and gram for short sides up to 128.
    :return: rank 0 for zero or empty input. Input that is not finite gives a factor of NaN.
    :raises PymergeError: x is no matrix, or the cut below 1e-6 or above 1.
    """
    import torch

    if x.dim() != 2:
        raise PymergeError(f"polar: expected a matrix, found {list(x.shape)}; reshape it first")
    if not 1e-6 <= cut <= 1:
        raise PymergeError(f"polar: expected a cut from 1e-6 to 1, found {cut}; correct it")
    scale = power_of_two(x)
    if scale == 0 or scale != scale:
        return Polar(torch.full_like(x, scale), 0, scale, scale)
    tall = x if x.shape[0] >= x.shape[1] else x.t()
    if route == "auto":
        route = "gram" if tall.shape[1] <= SMALL else "qdwh"
    if route == "iterate":
        # float32 squares: bring the largest element near 1, exactly.
        found = _iterate(tall / scale, ws)
    else:
        g = gram(tall, ws, side="columns")
        found = _rational(tall, g, cut, ws) if route == "qdwh" else None
    rank = tall.shape[1]
    if found is None:
        if route == "iterate":
            g = gram(tall, ws, side="columns")
        factor, rank = _by_eigenvectors(tall, g, cut, ws)
        residual = _correct(factor, rank, ws)
    else:
        factor, residual = found
    nuclear = _inner(factor, tall, ws)
    return Polar(factor if factor.shape == x.shape else factor.t(), rank, nuclear, residual)


def inverse_sqrt(g: torch.Tensor, ws: Workspace, cut: float = 1e-6) -> tuple[torch.Tensor, int]:
    """The inverse square root of a positive semidefinite matrix on the directions whose root
    eigenvalues are at least ``cut`` times the largest, 0 on the others; and how many those are.

    :param g: symmetric float64 [c, c].
    :return: float64 [c, c], the rank. A matrix that is not finite gives NaN and rank 0.
    """
    import torch

    values, vectors = gram_eigh(g, ws)
    if not bool(torch.isfinite(values).all()):
        return vectors, 0
    rank = _rank(values, cut)
    half = vectors[:, :rank] * values[:rank].pow(-0.25)
    return gram(half, ws, side="rows"), rank


def _rank(values: torch.Tensor, cut: float) -> int:
    kept = (values >= cut * cut * values[:1]) & (values > 0)
    return int(kept.sum())


def _by_eigenvectors(
    tall: torch.Tensor, g: torch.Tensor, cut: float, ws: Workspace
) -> tuple[torch.Tensor, int]:
    import torch

    values, vectors = gram_eigh(g, ws)
    rank = _rank(values, cut)
    kept = vectors[:, :rank].contiguous()
    del vectors

    def squares(rows: slice) -> torch.Tensor:
        return (tall[rows].double() @ kept).square_().sum(0)

    # The length of x·v is the singular value, more exact than the root of an eigenvalue.
    lengths = torch.stack(ws.map(squares, ws.panels(tall.shape[0]))).sum(0).sqrt_()
    inverse = ws.matmul(kept / lengths, kept.t())
    return product(tall, inverse, ws, out=tall.new_empty(tall.shape)), rank


def _rational(
    tall: torch.Tensor, g: torch.Tensor, cut: float, ws: Workspace
) -> tuple[torch.Tensor, float] | None:
    """The factor and its residual; None if a singular value is below the cut."""
    import torch

    bound = _largest(g) * 1.01
    g /= bound

    def certified(floor: float) -> bool:
        return cholesky(g, -floor * floor / 1.01)[1]

    # Well-conditioned input is told by the first of two factorisations.
    floor = FLOOR if cut < FLOOR and certified(FLOOR) else cut
    if floor == cut and not certified(cut):
        return None
    # Where products with the long side are dear, a third pole saves some.
    step = zolotarev(floor / 1.01, 2 if tall.shape[0] < 2 * tall.shape[1] else 3)

    def inverse(pole: int) -> torch.Tensor:
        factor, _ = cholesky(g, step.shifts[pole])
        # In place: with each pole on its thread the copies would add up.
        torch.cholesky_inverse(factor, out=factor)
        return factor.mul_(step.weights[pole] * step.scale)

    inverses = ws.map(inverse, range(len(step.shifts)))
    total = inverses.pop(0)
    while inverses:
        total += inverses.pop(0)
    total.diagonal().add_(step.scale)
    total /= math.sqrt(bound)
    start = [product(tall, total, ws, out=tall.new_empty(tall.shape))]
    del total
    # Taken out of the list, so that it is gone when the next iterate is there.
    return _converge(start.pop(), step.low, 1.0, ws)


def _iterate(tall: torch.Tensor, ws: Workspace) -> tuple[torch.Tensor, float] | None:
    import torch

    frobenius = float(torch.linalg.vector_norm(tall, dtype=torch.float64))
    x = tall / frobenius
    power = gram(x, ws, side="columns", dtype="float32")
    for _ in range(2):
        power = gram(power, ws, side="columns", dtype="float32")
    # The Frobenius norm of the fourth power is never below its largest eigenvalue.
    x /= 1.001 * float(torch.linalg.vector_norm(power, dtype=torch.float64)) ** 0.125
    return _converge(x, ITERATE_FLOOR, 1.0, ws)


def _converge(
    x: torch.Tensor, low: float, high: float, ws: Workspace
) -> tuple[torch.Tensor, float] | None:
    """Iterates in float32 from singular values in [low, high] to 1; None if they do not get
    there."""
    import torch

    size = x.shape[1]
    for _ in range(24):
        a_x = gram(x, ws, side="columns", dtype="float32")
        if low < 0.97 * high:
            # Rounding must not push a singular value out of the interval.
            high *= 1.001
            a, b, c, error = quintic(low, high)
            step = gram(a_x, ws, side="columns", dtype="float32").mul_(c).add_(a_x, alpha=b)
            step.diagonal().add_(a)
            x = product(x, step, ws)
            low, high = 1 - error, 1 + error
            continue
        a_x.neg_().diagonal().add_(1)
        defect = float(torch.linalg.vector_norm(a_x, dtype=torch.float64))
        if not defect < 2 * math.sqrt(size):
            return None
        if defect < CONVERGED * math.sqrt(size):
            return x, defect / math.sqrt(size)
        if defect >= 0.4 * math.sqrt(size):
            return None
        # As a correction: its rounding vanishes with it.
        if 0.75 * defect**2 < CONVERGED * math.sqrt(size):
            x.add_(product(x, a_x.mul_(0.5), ws))
            return x, max(defect**2, 1e-7)
        step = gram(a_x, ws, side="columns", dtype="float32").mul_(0.375).add_(a_x, alpha=0.5)
        x.add_(product(x, step, ws))
    return None


def _correct(x: torch.Tensor, rank: int, ws: Workspace) -> float:
    """One Newton-Schulz step in place; the residual before it."""
    import torch

    defect = product(x, gram(x, ws, side="columns", dtype="float32"), ws)
    torch.sub(x, defect, out=defect)
    x.add_(defect, alpha=0.5)
    return float(torch.linalg.vector_norm(defect, dtype=torch.float64)) / math.sqrt(max(rank, 1))


def _largest(g: torch.Tensor) -> float:
    """The largest eigenvalue by 30 power steps, from below."""
    import torch

    draw = np.random.Generator(np.random.Philox(SEED)).standard_normal(g.shape[0])
    vector = torch.from_numpy(draw).to(g.device)
    largest = 0.0
    for _ in range(30):
        vector /= torch.linalg.vector_norm(vector)
        vector = g @ vector
        largest = float(torch.linalg.vector_norm(vector))
    return largest


def _inner(a: torch.Tensor, b: torch.Tensor, ws: Workspace) -> float:
    """⟨a, b⟩ in float64."""

    def part(rows: slice) -> float:
        return float((a[rows].double() * b[rows].double()).sum())

    return math.fsum(ws.map(part, ws.panels(a.shape[0])))
