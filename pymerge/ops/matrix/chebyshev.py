"""The exponential filter of gradient flow: theta phi(C), phi(l) = (1 - exp(-time l)) / l.

phi is entire, so its Chebyshev expansion on [0, bound of lambda_max] converges faster than any
power; the expansion is evaluated on row tiles of theta, one product with C a degree, and needs
neither an eigendecomposition nor memory beyond three tiles a worker.

Numerics class: iterative. The expansion is cut where its tail is within 1e-7 of phi at every
eigenvalue; what the recurrence rounds is of the order of the type's epsilon times phi(0) = time.

With theta = theta_s + (D - theta_s C) phi(C) it is the flow of the objective of WUDI-Merging
(arXiv 2503.08099) from theta_s, stopped at ``time``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import PymergeError
from pymerge.ops.matrix import operands

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: What the cut of the expansion may change, relative to phi.
TAIL = 1e-7
#: Beyond this degree a factorisation is cheaper: time * lambda_max is about a million.
LARGEST_DEGREE = 4096


def chebyshev_filter(
    c: torch.Tensor, theta: torch.Tensor, ws: Workspace, *, time: float
) -> torch.Tensor:
    """theta phi(C) with phi(l) = (1 - exp(-time l)) / l, and phi(0) = time.

    :param c: [n, n], symmetric positive semi-definite up to rounding, float32 or float64.
    :param theta: [m, n] of the same type.
    :param time: of the gradient flow, zero or more.
    :returns: [m, n]; NaN where C is not finite.
    :raises PymergeError: shapes, types or the time do not fit, or time * lambda_max needs a degree
        above LARGEST_DEGREE.
    """
    op = "chebyshev_filter"
    n = operands.square(op, "c", c)
    operands.shaped(op, "theta", theta, operands.matrix(op, "theta", theta)[0], n)
    operands.alike(op, c=c, theta=theta)
    time = operands.at_least_zero(op, "time", time)
    return _filtered(c, theta, ws, lambda bound, eps: expansion(time, bound, eps))


def polynomial_filter(
    c: torch.Tensor,
    theta: torch.Tensor,
    ws: Workspace,
    phi: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> torch.Tensor:
    """theta phi(C) for a smooth function of the eigenvalues.

    :param c: [n, n], symmetric positive semi-definite up to rounding, float32 or float64.
    :param theta: [m, n] of the same type.
    :param phi: its values at points from 0 to a bound of the largest eigenvalue.
    :returns: [m, n]; NaN where C is not finite.
    :raises PymergeError: shapes or types do not fit, or phi has values that are not finite or needs
        a degree above LARGEST_DEGREE.
    """
    op = "polynomial_filter"
    n = operands.square(op, "c", c)
    operands.shaped(op, "theta", theta, operands.matrix(op, "theta", theta)[0], n)
    operands.alike(op, c=c, theta=theta)

    def weights(bound: float, eps: float) -> NDArray[np.float64]:
        largest = float(np.abs(phi(bound * np.linspace(0, 1, 65))).max())
        found = None
        if math.isfinite(largest):
            found = coefficients(lambda x: phi(bound * x), largest * max(TAIL, eps / 16))
        if found is None:
            raise PymergeError(
                f"{op}: expected a function that a polynomial of degree {LARGEST_DEGREE} follows "
                f"on [0, {bound:.3g}], found one up to {largest:.3g} that none does; choose a "
                "smoother one"
            )
        return found

    return _filtered(c, theta, ws, weights)


def _filtered(
    c: torch.Tensor,
    theta: torch.Tensor,
    ws: Workspace,
    weights_for: Callable[[float, float], NDArray[np.float64]],
) -> torch.Tensor:
    import torch

    bound = largest_eigenvalue(c, ws)
    out = torch.empty_like(theta)
    if not math.isfinite(bound):
        return out.fill_(math.nan)
    weights = weights_for(bound, torch.finfo(theta.dtype).eps)

    def tile(part: slice) -> None:
        _evaluate(weights, bound, c, theta[part], out[part], ws)

    ws.map(tile, ws.panels(theta.shape[0]))
    return out


def largest_eigenvalue(c: torch.Tensor, ws: Workspace) -> float:
    """A bound of the largest eigenvalue of a symmetric matrix, never below it: the smaller of the
    largest row sum and ||C C||_F ** 0.5, with what the product may have rounded."""
    import torch

    n = c.shape[0]
    if n == 0:
        return 0.0
    sums = ws.map(lambda part: _row_sums(c[part]), ws.panels(n))
    largest = float(np.max([total for total, _ in sums]))
    if not (0 < largest < math.inf):
        return largest
    # A power of two, so that the squares neither overflow nor vanish.
    unit = 2.0 ** -math.frexp(largest)[1]
    squares = ws.map(lambda part: _squares(torch.mm(c[part] * unit, c) * unit), ws.panels(n))
    rounding = n * torch.finfo(c.dtype).eps * sum(s for _, s in sums) * unit * unit
    return min(largest, math.sqrt(math.sqrt(sum(squares)) + rounding) / unit)


def expansion(time: float, bound: float, epsilon: float) -> NDArray[np.float64]:
    """Coefficients of phi in the Chebyshev polynomials of [0, bound], the first of them whole, cut
    where the rest sums to no more than TAIL of the least phi, or to what a type of that epsilon
    loses."""
    span = time * bound
    tail = max(TAIL * float(_phi(np.array(span))), epsilon / 16, 1e-14)
    # The degree grows as the root of the span, so one of LARGEST_DEGREE ** 2 is hopeless.
    found = coefficients(lambda x: _phi(span * x), tail) if span < LARGEST_DEGREE**2 else None
    if found is None:
        raise PymergeError(
            f"chebyshev_filter: time * lambda_max is up to {span:.3g}, which takes a degree above "
            f"{LARGEST_DEGREE}; use a shorter time or the closed form"
        )
    return time * found


def coefficients(
    phi: Callable[[NDArray[np.float64]], NDArray[np.float64]], tail: float
) -> NDArray[np.float64] | None:
    """Coefficients of phi in the Chebyshev polynomials of [0, 1], cut where the rest sums to no
    more than ``tail``; None where that takes a degree above LARGEST_DEGREE."""
    num = 16
    while num <= 4 * LARGEST_DEGREE:
        angles = np.pi * np.arange(num + 1) / num
        # The point (1 + cos) / 2 of the interval, without the cancellation near its start.
        samples = phi(np.cos(angles / 2) ** 2)
        mirrored = np.concatenate([samples, samples[-2:0:-1]])
        weights = np.fft.rfft(mirrored).real / num
        weights[0] /= 2
        weights[-1] /= 2
        rest = np.cumsum(np.abs(weights[::-1]))[::-1]
        small = np.flatnonzero(rest <= tail)
        # Coefficients near the last one sampled carry those beyond it.
        if small.size and small[0] <= min(num // 2, LARGEST_DEGREE):
            return weights[: max(int(small[0]), 1)]
        num *= 2
    return None


def _phi(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 - exp(-y)) / y, 1 at 0."""
    divisor = np.where(y == 0, 1.0, y)
    result: NDArray[np.float64] = np.where(y == 0, 1.0, -np.expm1(-y) / divisor)
    return result


def _evaluate(
    weights: NDArray[np.float64],
    bound: float,
    c: torch.Tensor,
    theta: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
) -> None:
    """Clenshaw's recurrence: s_k = w_k theta + 2 s_(k+1) X - s_(k+2) with X = 2 C / bound - I."""
    import torch

    last = len(weights) - 1
    if last == 0:
        torch.mul(theta, float(weights[0]), out=out)
        return
    newer, older = theta * float(weights[last]), torch.zeros_like(theta)
    for k in range(last - 1, -1, -1):
        ws.check()
        # The last step, k = 0, takes s_1 once.
        times = 2.0 if k else 1.0
        older.addmm_(newer, c, beta=-1, alpha=2 * times / bound)
        older.sub_(newer, alpha=times)
        older.add_(theta, alpha=float(weights[k]))
        newer, older = older, newer
    out.copy_(newer)


def _row_sums(part: torch.Tensor) -> tuple[float, float]:
    """The largest sum of magnitudes of a row, and the sum of squares."""
    wide = part.double()
    return float(wide.abs().sum(dim=1).max()), float(wide.square().sum())


def _squares(part: torch.Tensor) -> float:
    return float(part.double().square().sum())
