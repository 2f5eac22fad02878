"""The quadratic that interference methods minimise, built from one task vector at a time.

``L(θ) = Σᵢ wᵢ·‖(θ − tᵢ)·pᵢᵀ‖²`` with targets tᵢ and projectors pᵢ (the task vector itself in WUDI,
low-rank parts of it in OptMerge) has the gradient ``2·(δC − R)`` at ``θ = S + δ``, where S is where
the descent starts, ``C = Σ wᵢ·pᵢᵀpᵢ`` [n, n] and ``R = Σ wᵢ·(tᵢ − S)·pᵢᵀpᵢ`` [m, n]. However many
tasks there are, a solver sees C, R and S; so the matrices in memory are these three, the task
vector that is being added and its difference to S.

R is not formed as ``Σ wᵢ·tᵢpᵢᵀpᵢ − SC``, which would take one look at the models instead of two:
what float32 rounds of these two terms, which nearly cancel, was 9e-6 to 2e-5 of Adam's iterates in
float64; with the sum of differences it was 4e-6 (128 to 256 rows, 300 steps).

The weight ``wᵢ = 1/‖τᵢ‖²`` makes C free of scale; a task vector of zeros gets the weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import PymergeError
from pymerge.methods.matrices import FLOAT
from pymerge.methods.protocol import Cost

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Eigenvalues of C below this share of the largest are what rounding left of zero.
CUT = 1e-10
#: Terms of a float32 product that are summed before float64 takes over.
CHUNK = 1024
#: Columns of C that a device works on at a time; the host takes the workspace's panels.
DEVICE_STRIP = 2048


class Quadratic:
    """C and R of that ``dtype``, and S, float32 [m, n].

    ``finite`` turns false where a task vector is not finite: then no matrix is worth computing.
    """

    def __init__(self, start: torch.Tensor, ws: Workspace, dtype: str = "float32") -> None:
        rows, columns = start.shape
        self.ws = ws
        self.start = start
        self.c = ws.zeros(columns, columns, dtype=dtype)
        self.r = ws.zeros(rows, columns, dtype=dtype)
        self.finite = True

    def add(self, held: list[torch.Tensor]) -> None:
        """One more task, target and projector in one; its task vector is taken out of the list and
        overwritten, so that it is gone when the next one is gathered."""
        tau = held.pop()
        norm = self.norm(tau)
        if not self.finite or norm == 0:
            return
        # An exact factor that keeps the squares of a tiny task vector within float32.
        unit = 2.0 ** math.frexp(norm)[1]
        away = self.ws.empty(*tau.shape, dtype=str(self.r.dtype).removeprefix("torch."))

        def split(part: slice) -> None:
            away[part] = tau[part]
            away[part] -= self.start[part]
            tau[part] /= unit

        self.ws.map(split, self.ws.panels(tau.shape[0]))
        weight = (unit / norm) ** 2
        x = tau.to(self.c.dtype)
        m, n = x.shape
        # (τ−S)(τᵀτ) costs 2mn² beside the other triangle of C, ((τ−S)τᵀ)τ costs 4m²n; what is
        # rounded in the second stays in the rows of τ, so square matrices take it too.
        wide = m <= n

        def columns(part: slice) -> None:
            first = part.start if wide else 0
            gram = _product(x.t()[part], x.t()[first:])
            self.c[part, first:].add_(gram, alpha=weight)
            if not wide:
                self.r[:, part].addmm_(away, gram.t(), alpha=weight)

        def rows(part: slice) -> None:
            self.r[part].addmm_(_product(away[part], x), x, alpha=weight)

        self.ws.map(columns, self._strips(n))
        if wide:
            self.ws.map(rows, self._strips(m))

    def add_factors(
        self, norm: float, image: torch.Tensor, values: torch.Tensor, right: torch.Tensor
    ) -> None:
        """One more task of that norm whose projector is ``diag(values [k])·right [k, n]`` up to an
        isometry and whose target t gives ``image = (t − S)·rightᵀ`` [m, k]."""
        kind = self.c.dtype
        scaled = (right * (values / norm).square()[:, None]).to(kind)
        left, image = right.t().to(kind), image.to(kind)
        self.ws.map(lambda p: self.c[p].addmm_(left[p], scaled), self._strips(len(self.c)))
        self.ws.map(lambda p: self.r[p].addmm_(image[p], scaled), self._strips(len(self.r)))

    def norm(self, tau: torch.Tensor) -> float:
        """‖tau‖_F in float64; where it is not finite, neither is the result."""
        import torch

        def squares(part: slice) -> float:
            return float(torch.linalg.vector_norm(tau[part], dtype=torch.float64)) ** 2

        total = math.sqrt(sum(self.ws.map(squares, self.ws.panels(tau.shape[0]))))
        self.finite = self.finite and math.isfinite(total)
        return total

    def mirror(self) -> None:
        """Make C symmetric to the bit by its upper triangle."""

        def strip(part: slice) -> None:
            self.c[part, part] = self.c[part, part].triu() + self.c[part, part].triu(1).t()
            self.c[part.stop :, part] = self.c[part, part.stop :].t()

        self.ws.map(strip, self._strips(len(self.c)))

    def adam(self, steps: int, lr: float) -> torch.Tensor:
        """The iterate after ``steps`` steps of Adam."""
        from pymerge.ops.matrix import adam_quadratic

        zeros = self.ws.zeros(1, 1).expand(self.r.shape)
        return self._from_start(adam_quadratic(zeros, self.c, self.r, self.ws, steps=steps, lr=lr))

    def flow(self, time: float) -> torch.Tensor:
        """``S + R·φ(C)`` with ``φ(λ) = (1 − e^(−time·λ))/λ``, without an eigendecomposition."""
        from pymerge.ops.matrix import chebyshev_filter

        return self._from_start(chebyshev_filter(self.c, self.r, self.ws, time=time))

    def momentum(self, steps: int, lr: float, momentum: float) -> torch.Tensor:
        """The iterate after ``steps`` steps of gradient descent with heavy-ball momentum. Each step
        is linear in θ, so all of them together are one polynomial of C.

        :raises PymergeError: the steps are so large that no polynomial of moderate degree follows.
        """
        from pymerge.ops.matrix import polynomial_filter

        def phi(values: NDArray[np.float64]) -> NDArray[np.float64]:
            moved, velocity = np.zeros_like(values), np.zeros_like(values)
            with np.errstate(over="ignore", invalid="ignore"):
                for _ in range(steps):
                    velocity = momentum * velocity + 2 * (1 - values * moved)
                    moved += lr * velocity
            return moved

        try:
            return self._from_start(polynomial_filter(self.c, self.r, self.ws, phi))
        except PymergeError as error:
            raise PymergeError(
                f"{steps} steps of gradient descent with lr {lr:g} and momentum {momentum:g} go "
                "beyond all bounds where they should settle; lower lr or steps"
            ) from error

    def spectral(
        self, phi: Callable[[torch.Tensor], torch.Tensor], most: int | None = None
    ) -> torch.Tensor:
        """``S + R·φ(C)`` where φ takes the eigenvalues of C, descending, those below the cut left
        out; on the ``most`` largest of them only."""
        from pymerge.ops.matrix import gram_eigh

        values, vectors = gram_eigh(self.c, self.ws)
        self.c = values
        count = int((values > CUT * values[0]).sum())
        kept = vectors[:, : count if most is None else min(count, most)]
        factors = phi(values[: kept.shape[1]])
        result = self.ws.empty(*self.r.shape)

        def panel(part: slice) -> None:
            found = (self.r[part].double() @ kept).mul_(factors) @ kept.t()
            result[part] = found.add_(self.start[part])

        self.ws.map(panel, self.ws.panels(len(result)))
        return result

    def ridge(self, ridge: float) -> torch.Tensor:
        """``S + R·(C + ridge·mean(diag C)·1)⁻¹``, by Cholesky."""
        from pymerge.ops.matrix import solve_spd

        found = solve_spd(self.c, self.r.t(), self.ws, ridge=ridge).x.t()
        result = self.ws.empty(*found.shape)

        def panel(part: slice) -> None:
            result[part] = found[part] + self.start[part]

        self.ws.map(panel, self.ws.panels(len(result)))
        return result

    def _strips(self, num: int) -> list[slice]:
        return self.ws.panels(num, None if self.ws.on_host else DEVICE_STRIP)

    def _from_start(self, result: torch.Tensor) -> torch.Tensor:
        self.ws.map(lambda p: result[p].add_(self.start[p]), self.ws.panels(len(result)))
        return result


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ rightᵀ``; of float32 in sums of CHUNK terms, which are summed in float64."""
    import torch

    num = left.shape[1]
    if num <= CHUNK or left.dtype == torch.float64:
        return left @ right.t()
    total = left.new_zeros((len(left), len(right)), dtype=torch.float64)
    for first in range(0, num, CHUNK):
        terms = slice(first, first + CHUNK)
        total += left[:, terms] @ right[:, terms].t()
    return total.float()


def build_flops(rows: int, columns: int, num_models: int) -> float:
    """Flops that adding ``num_models`` task vectors takes."""
    m, n = float(rows), float(columns)
    each = m * n * n + 4 * m * m * n if m <= n else 4 * m * n * n
    return num_models * each


def iterative_cost(rows: int, columns: int, num_models: int, products: float) -> Cost:
    """Of building in float32 and solving by ``products`` products of [m, n] with C: C, R and the
    start with the task vector and its difference to it, which make room for the result."""
    num_bytes = FLOAT * (columns**2 + 4 * rows * columns)
    flops = build_flops(rows, columns, num_models) + 2.0 * products * rows * columns**2
    return Cost(num_bytes, flops)


def direct_cost(rows: int, columns: int, num_models: int, *, double: bool, eigen: bool) -> Cost:
    """Of building in float32 or float64 and solving by an eigendecomposition or Cholesky."""
    item = 8 if double else FLOAT
    elements, square = rows * columns, columns**2
    # R, the start, the task vector, its difference to the start and a copy in float64.
    building = item * square + (2 * item + 2 * FLOAT + (8 if double else 0)) * elements
    # C as float64, LAPACK's vectors and its work, the vectors in order; or a copy that becomes the
    # factor.
    solving = (item + (5 * 8 if eigen else 8)) * square + (item + 2 * FLOAT) * elements
    solving += 0 if eigen else 8 * elements
    flops = build_flops(rows, columns, num_models)
    last = 4.0 * elements * columns + (0 if eigen else columns**3 / 3)
    return Cost(
        max(building, solving),
        0.0 if double else flops,
        last + (flops if double else 0.0),
        9.0 * columns**3 if eigen else 0.0,
    )
