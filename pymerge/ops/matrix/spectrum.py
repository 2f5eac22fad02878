"""Singular values and vectors by way of the Gram matrix of the short side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pymerge.errors import PymergeError
from pymerge.ops.matrix.gram import Dtype, gram
from pymerge.ops.matrix.products import product

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Names the test matrix of the randomized route: the same for every call.
SEED = 20110503


class Spectrum(NamedTuple):
    """Eigenvalues [c], descending and not negative, and eigenvectors, the columns of [c, c]; both
    float64."""

    values: torch.Tensor
    vectors: torch.Tensor


class Svd(NamedTuple):
    """``left [m, k] · diag(values [k]) · right [k, n]``, values float64 and descending.

    ``tail`` is the energy left out: ‖x‖² less the sum of the squared values.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    tail: float


def gram_eigh(g: torch.Tensor, ws: Workspace) -> Spectrum:
    """The eigenvalues and eigenvectors of a positive semidefinite matrix.

    :param g: symmetric [c, c], float64 or float32; only the lower triangle is read.
    :return: values clamped at 0. A matrix that is not finite gives NaN throughout.
    """
    import torch

    ws.check()
    wide = g.double()
    if not bool(torch.isfinite(wide).all()):
        return Spectrum(wide.new_full((len(g),), float("nan")), torch.full_like(wide, float("nan")))
    values, vectors = torch.linalg.eigh(wide)
    return Spectrum(values.flip(0).clamp_(min=0), vectors.flip(1))


def truncated_svd(
    x: torch.Tensor,
    rank: int,
    ws: Workspace,
    *,
    route: Literal["gram", "randomized"] = "gram",
    dtype: Dtype = "float64",
    cut: float = 1e-6,
    oversample: int | None = None,
    power_steps: int = 6,
) -> Svd:
    """The ``rank`` largest singular values with their vectors, fewer where values are below ``cut``
    times the largest.

    :param x: float32 [m, n].
    :param route: gram is exact: eigenvectors of the Gram matrix of the short side, the other side
        by a product. randomized (Halko, Martinsson and Tropp, arXiv 0909.4061) sketches ``rank +
        oversample`` directions with ``power_steps`` subspace iterations: near the best error, but
        without a gap in the spectrum not the best directions; ``tail`` tells what it left out.
    :param dtype: of the Gram matrix, the products and the vectors. float32 is for results that
        nothing divides by: singular values below 1e-3 of the largest are lost in it.
    :param cut: at least 1e-6 in float64; float32 raises it to 1e-3.
    :param oversample: ``rank`` if not given.
    :return: k = 0 for zero or empty input. Input that is not finite gives ``rank`` of NaN.
    :raises PymergeError: ``rank`` is negative, or x no matrix.
    """
    import torch

    if x.dim() != 2 or rank < 0:
        raise PymergeError(
            f"truncated_svd: expected a matrix and a rank of 0 or more, found {list(x.shape)} "
            f"and {rank}; reshape the matrix or correct the rank"
        )
    rank = min(rank, *x.shape)
    kind = getattr(torch, dtype)
    tall = x if x.shape[0] >= x.shape[1] else x.t()
    scale = power_of_two(x)
    if scale != scale:
        nan = float("nan")
        left = x.new_full((x.shape[0], rank), nan, dtype=kind)
        right = x.new_full((rank, x.shape[1]), nan, dtype=kind)
        return Svd(left, x.new_full((rank,), nan, dtype=torch.float64), right, nan)
    if dtype == "float32":
        cut = max(cut, 1e-3)
        # float32 squares: bring the largest element near 1, exactly.
        tall = tall / scale if scale not in (0.0, 1.0) else tall
    else:
        scale = 1.0
    if route == "gram":
        short, energy = _gram_vectors(tall, rank, ws, dtype)
    else:
        extra = rank if oversample is None else oversample
        short = _sketched_vectors(tall, rank, min(rank + extra, tall.shape[1]), power_steps, ws)
        short = short.to(kind)
        energy = float(torch.linalg.vector_norm(tall, dtype=torch.float64)) ** 2
    long = product(tall, short, ws)
    # The length of x·v is the singular value, more exact than the root of an eigenvalue.
    values = torch.linalg.vector_norm(long, dim=0, dtype=torch.float64)
    values, order = values.sort(descending=True, stable=True)
    keep = int((values > cut * values[:1]).sum())
    if keep < rank or not bool((order[1:] > order[:-1]).all()):
        long, short = long[:, order[:keep]], short[:, order[:keep]]
    values = values[:keep]
    long /= values
    tail = max(energy - float(values.square().sum()), 0.0) * scale * scale
    left, right = (long, short) if x.shape[0] >= x.shape[1] else (short, long)
    return Svd(left, values * scale, right.t().contiguous(), tail)


def _gram_vectors(
    tall: torch.Tensor, rank: int, ws: Workspace, dtype: Dtype
) -> tuple[torch.Tensor, float]:
    """The leading right singular vectors [n, rank], and ‖tall‖²."""
    g = gram(tall, ws, side="columns", dtype=dtype)
    vectors = gram_eigh(g, ws).vectors[:, :rank].to(g.dtype)
    return vectors.contiguous(), float(g.diagonal().double().sum())


def _sketched_vectors(
    tall: torch.Tensor, rank: int, width: int, power_steps: int, ws: Workspace
) -> torch.Tensor:
    """Right singular vectors [n, rank] of the tall matrix within a sketched subspace, float64."""
    import torch

    draw = np.random.Generator(np.random.Philox(SEED))
    start = draw.standard_normal((tall.shape[1], width), dtype=np.float32)
    basis = torch.from_numpy(start).to(tall.device)
    for _ in range(power_steps):
        image, _ = torch.linalg.qr(product(tall, basis, ws))
        ws.check()
        basis, _ = torch.linalg.qr(product(tall.t(), image, ws))
        ws.check()
    basis, _ = torch.linalg.qr(basis.double())
    within = gram(product(tall, basis, ws), ws, side="columns")
    return product(basis, gram_eigh(within, ws).vectors[:, :rank].contiguous(), ws)


def svt(x: torch.Tensor, threshold: float, ws: Workspace, dtype: Dtype = "float64") -> torch.Tensor:
    """``x`` with its singular values lowered by ``threshold``, and dropped where that is below 0:
    the proximal map of ``threshold`` times the nuclear norm (Cai, Candès and Shen,
    arXiv 0810.3286). Directions that are dropped are not formed.

    :param x: float32 [m, n].
    :param threshold: not negative.
    :param dtype: of the Gram matrix and the products.
    :return: like x; NaN throughout for input that is not finite.
    :raises PymergeError: ``threshold`` is negative or x no matrix.
    """
    import torch

    if not threshold >= 0:
        raise PymergeError(f"svt: expected a threshold of 0 or more, found {threshold}; correct it")
    scale = power_of_two(x)
    if scale != scale or scale == 0:
        return torch.full_like(x, scale)
    tall = (x if x.shape[0] >= x.shape[1] else x.t()) / scale
    threshold /= scale
    values, vectors = gram_eigh(gram(tall, ws, side="columns", dtype=dtype), ws)
    kept = vectors[:, : int((values > threshold * threshold).sum())].to(getattr(torch, dtype))
    image = product(tall, kept, ws)
    lengths = torch.linalg.vector_norm(image, dim=0, dtype=torch.float64)
    image *= torch.where(lengths > threshold, (1 - threshold / lengths) * scale, 0.0)
    result = torch.empty_like(x)
    product(image, kept.t(), ws, out=result if result.shape == tall.shape else result.t())
    return result


def power_of_two(x: torch.Tensor) -> float:
    """The power of two at x's largest magnitude, by which dividing is exact; 0 for zeros, NaN for
    input that is not finite."""
    if x.numel() == 0:
        return 0.0
    low, high = x.aminmax()
    largest = max(-float(low), float(high))
    if not np.isfinite(largest):
        return float("nan")
    return float(np.exp2(np.floor(np.log2(largest)))) if largest else 0.0
