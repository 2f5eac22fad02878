"""How the factors of one module are combined: from torch matrices to torch matrices.

Each update is weight * scale * B A with B [m, rank] and A [rank, n], float32. The rules that PEFT
has under the same names are its ``add_weighted_adapter``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pymerge.lora.truncate import Truncation
from pymerge.ops.matrix.core import core_space
from pymerge.ops.matrix.spectrum import truncated_svd

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Singular values of a sum below this share of its largest term are rounding errors.
CORE_CUT = 1e-13


class Low(NamedTuple):
    """One update's factors, what their product is multiplied by in its adapter, and its weight."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: float = 1.0

    @property
    def factor(self) -> float:
        return self.scale * self.weight


class Combined(NamedTuple):
    """The factors of the result, and the share of the squared norm that a truncation left."""

    a: torch.Tensor
    b: torch.Tensor
    energy: float | None = None


def cat(updates: Sequence[Low]) -> Combined:
    """The sum of the updates exactly, by factors side by side: its rank is the sum of theirs."""
    import torch

    a = torch.cat([each.a.double() * each.factor for each in updates])
    return Combined(a, torch.cat([each.b for each in updates], dim=1))


def linear(updates: Sequence[Low]) -> Combined:
    """Sums of A and of B, each with the root of its factor: not the sum of the products."""
    roots = signed_roots(updates)
    a = sum(each.a.double() * root for each, (root, _) in zip(updates, roots, strict=True))
    b = sum(each.b.double() * root for each, (_, root) in zip(updates, roots, strict=True))
    return Combined(a, b)  # type: ignore[arg-type]


def svd(updates: Sequence[Low], truncation: Truncation, ws: Workspace) -> Combined:
    """The truncated SVD of the sum of the updates, in their core space."""
    import torch

    core = core_space([(each.b.double() * each.factor, each.a) for each in updates], ws)
    total: torch.Tensor = sum(core.cores[1:], start=core.cores[0])
    left, values, right = torch.linalg.svd(total)
    largest = max(float(each.norm()) for each in core.cores)
    values = values[: int((values > CORE_CUT * largest).sum())]
    keep, energy = truncation.count(values, float(values.square().sum()))
    if not keep:
        return Combined(core.right.T[:1] * 0, core.left[:, :1] * 0, energy)
    b, a = truncation.split(left[:, :keep], values[:keep], right[:keep])
    return Combined(a @ core.right.T, core.left @ b, energy)


def by_factor(
    rule: Callable[[Sequence[torch.Tensor], Sequence[float], float], torch.Tensor],
    updates: Sequence[Low],
    density: float,
) -> Combined:
    """A rule for tensors on the factors A and on the factors B."""
    roots = signed_roots(updates)
    a = rule([each.a for each in updates], [root for root, _ in roots], density)
    return Combined(a, rule([each.b for each in updates], [root for _, root in roots], density))


def by_product(
    rule: Callable[[Sequence[torch.Tensor], Sequence[float], float], torch.Tensor],
    updates: Sequence[Low],
    density: float,
    truncation: Truncation,
    ws: Workspace,
) -> Combined:
    """A rule for tensors on the products B A, and the truncated SVD of what it gives."""
    products = [ws.matmul(each.b, each.a) * each.scale for each in updates]
    merged = rule(products, [each.weight for each in updates], density).float()
    most = min(truncation.rank or min(merged.shape), *merged.shape)
    left, values, right, tail = truncated_svd(merged, most, ws)
    keep, energy = truncation.count(values, float(values.square().sum()) + tail)
    if not keep:
        return Combined(merged[:1].double() * 0, merged[:, :1].double() * 0, energy)
    b, a = truncation.split(left[:, :keep], values[:keep], right[:keep])
    return Combined(a, b, energy)


def ties(tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Trim each to its largest elements, elect the sign of the sum (plus where it is 0), and divide
    the weighted sum of those that have it by their number."""
    import torch

    trimmed = torch.stack([prune(tensor, density) for tensor in tensors]).double()
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    scaled = trimmed * torch.tensor(weights, dtype=torch.float64, device=trimmed.device).reshape(
        -1, *[1] * tensors[0].dim()
    )
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def magnitude_prune(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float
) -> torch.Tensor:
    """The weighted sum of what each keeps of its largest elements."""
    kept = [
        prune(tensor, density).double() * weight
        for tensor, weight in zip(tensors, weights, strict=True)
    ]
    return sum(kept[1:], start=kept[0])


def prune(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The tensor with all but its ``int(density * size)`` elements of largest magnitude set to 0;
    of equal ones those that come first stay."""
    import torch

    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    order = flat.abs().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    kept = torch.zeros_like(flat)
    kept[order] = flat[order]
    return kept.reshape(tensor.shape)


def robust_merge(
    updates: Sequence[Low], mask_ratio: float = 0.2, lift_ratio: float = 0.2
) -> Combined:
    """RobustMerge (first called CoPA-Merging), arXiv 2502.17159, as its code computes it.

    A and B are trimmed each: elements below the ``int((1 - mask_ratio) * size)``-th smallest
    magnitude become 0. What a row of A lost gives the strength of its direction, s = Σ|row| /
    Σ|trimmed row|; those below the quantile ``1 - lift_ratio`` of an adapter are lifted to it. With
    T adapters A = Σ 2 trim(A_t), and B = Σ 2 s_t trim(B_t) / Σ s_t for each column. Scales are not
    looked at. The code divides by 0 for a row that is trimmed away: here such a row, of which
    nothing is left in A, counts with the largest s of its adapter.
    """
    import torch

    a = torch.zeros_like(updates[0].a, dtype=torch.float64)
    b = torch.zeros_like(updates[0].b, dtype=torch.float64)
    strengths = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for each in updates:
        trimmed = _trim(each.a, mask_ratio).double()
        whole, left = each.a.double().abs().sum(1), trimmed.abs().sum(1)
        kept = left > 0
        strength = torch.where(kept, whole / left, 0.0)
        largest = strength.max() if bool(kept.any()) else strength.new_ones(())
        strength = torch.where(kept, strength, largest)
        floor = min(int(len(strength) * (1 - lift_ratio)), len(strength) - 1)
        strength = strength.clamp(min=strength.sort().values[floor])
        a += 2 * trimmed
        b += 2 * strength * _trim(each.b, mask_ratio).double()
        strengths += strength
    return Combined(a, b / strengths)


def _trim(tensor: torch.Tensor, ratio: float) -> torch.Tensor:
    """Zero where the magnitude is below that of an order statistic; equal ones stay."""
    import torch

    magnitudes = tensor.abs()
    place = int((1 - ratio) * tensor.numel())
    if place < 1:
        return tensor
    least = magnitudes.reshape(-1).kthvalue(place).values
    return torch.where(magnitudes >= least, tensor, torch.zeros_like(tensor))


def signed_roots(updates: Sequence[Low]) -> list[tuple[float, float]]:
    """What A and B are multiplied by: the roots of the factors, the sign on A."""
    roots = [math.sqrt(abs(each.factor)) for each in updates]
    return [
        (math.copysign(root, each.factor), root) for each, root in zip(updates, roots, strict=True)
    ]
