"""task_arithmetic, ties and breadcrumbs, step by step as mergekit takes them.

What is ranked are the magnitudes of the task vectors after they were rounded to the working format,
of which many are equal in 16 bits. mergekit leaves the choice among equal ones to a sort that is
not stable; here the first in the order of the index are the larger ones, exactly as many are kept.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.methods.breadcrumbs import kept_ranks
from pymerge.methods.protocol import Cost, Method, Question, Solve, Solving, Tensor, Tile
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import PIECE, Piece, load_into, piece_cost
from pymerge.methods.stepwise.sparse import (
    SHARED,
    l1_factor,
    merge_sparse,
    task_arithmetic,
)
from pymerge.methods.stepwise.whole import chunks, gather_delta, whole_cost
from pymerge.methods.ties import num_kept
from pymerge.methods.trim import TRIM_OPS, Trimming, trim_tensor
from pymerge.ops.selection import ABOVE_ALL, Keep
from pymerge.ops.view import Buffer, View

if TYPE_CHECKING:
    import torch

Factors = Sequence["torch.Tensor | None"]


def ties(tensor: Tensor) -> Solving:
    """Trim to the largest, elect, sum."""
    return _merge(tensor, _keep_largest(tensor), elects=True)


def breadcrumbs(tensor: Tensor, *, elects: bool) -> Solving:
    """Trim at both ends, sum."""
    return _merge(tensor, _keep_between(tensor), elects=elects)


def _merge(tensor: Tensor, trimming: Trimming, *, elects: bool) -> Solving:
    keeps = yield from trimming
    densities = tensor.each("density")
    factors: Factors = [None] * tensor.num_models
    if _rescales(tensor):
        factors = yield from _factors(tensor, keeps)

    def sparse(model: int, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
        if densities[model] >= 1:
            return delta
        if densities[model] <= 0 and "gamma" not in tensor.parameters:
            return delta.zero_()  # not a product with zero, which may be minus zero
        masked = delta * kept(keeps[model], delta, piece.start)
        factor = factors[model]
        return masked if factor is None else masked * factor

    return merge_sparse(tensor, sparse, elects=elects)


def kept(keep: Keep, delta: torch.Tensor, start: int) -> torch.Tensor:
    """Which elements stay, [num] bool; ``start`` is the index of the first one in the tensor."""
    import torch

    keys = delta.abs().to(torch.float32).view(torch.int32)

    def above(threshold: int, cutoff: int) -> torch.Tensor:
        found = keys > threshold
        first = min(max(cutoff - start, 0), len(keys))
        found[:first] |= keys[:first] == threshold
        return found

    stays = above(keep.threshold, keep.cutoff)
    if keep.ceiling < ABOVE_ALL:
        stays &= ~above(keep.ceiling, keep.ceiling_cutoff)
    return stays


def _keep_largest(tensor: Tensor) -> Trimming:
    n = tensor.num_elements
    keep = [num_kept(density, n) for density in tensor.each("density")]
    return (yield from trim_tensor(tensor, keep, ranked=partial(rounded, tensor)))


def _keep_between(tensor: Tensor) -> Trimming:
    n, models = tensor.num_elements, range(tensor.num_models)
    ranks = [
        (n, 0) if density >= 1 else kept_ranks(n, density, gamma, "outliers_first", "tensor")
        for density, gamma in zip(tensor.each("density"), tensor.each("gamma"), strict=True)
    ]
    wanted = [reached for reached, _ in ranks] + [dropped for _, dropped in ranks]
    found = yield from trim_tensor(
        tensor, wanted, models=[*models, *models], ranked=partial(rounded, tensor)
    )
    return [
        Keep(low.threshold, low.cutoff, high.threshold, high.cutoff)
        for low, high in zip(found[: len(models)], found[len(models) :], strict=True)
    ]


def rounded(tensor: Tensor, tile: Tile) -> Iterable[Tile]:
    """The tile's task vectors as they are after the rounding, piece by piece."""
    ops = tensor.ops

    def in_working(view: View) -> tuple[View, Buffer | None]:
        if view.code == tensor.working.code:
            return view, None
        buffer = ops.buffer(view.num, tensor.working)
        load_into(tensor, buffer.view, view)
        return buffer.view, buffer

    for _, piece in tile.pieces(PIECE):
        if piece.base is None:
            raise RuntimeError("a task vector has no base")
        base, _base_memory = in_working(piece.base)
        found = []
        for model in piece.models:
            source, _memory = in_working(model)
            delta = ops.buffer(piece.num, tensor.working)
            ops.axpy_n(delta.view, [source], [1.0], base=base, add_base=False)
            found.append(delta)
        yield Tile(piece.start, piece.num, None, tuple(delta.view for delta in found))


def _factors(tensor: Tensor, keeps: Sequence[Keep]) -> Generator[Question, Any, Factors]:
    found: list[torch.Tensor | None] = []
    for model, density in enumerate(tensor.each("density")):
        if not _restores(density):
            found.append(None)
            continue
        delta = yield from gather_delta(tensor, model)
        found.append((yield Solve(partial(_factor, tensor, keeps[model], delta))))
        del delta
    return found


def _factor(tensor: Tensor, keep: Keep, delta: torch.Tensor) -> torch.Tensor | None:
    import torch

    masked = torch.empty_like(delta)
    for part in chunks(tensor):
        masked[part] = delta[part] * kept(keep, delta[part], part.start)
    return l1_factor(delta, masked)


def _restores(density: float) -> bool:
    return 0 < density < 1


def _rescales(tensor: Tensor) -> bool:
    if not tensor.parameters.get("rescale") or not tensor.num_elements:
        return False
    return any(map(_restores, tensor.each("density")))


def _looks(tensor: Tensor) -> float:
    trims = any(density < 1 for density in tensor.each("density"))
    inputs = tensor.num_models + 1
    again = 2 * sum(map(_restores, tensor.each("density"))) / inputs if _rescales(tensor) else 0
    return 2 * int(trims) + again


def _cost(tensor: Tensor) -> Cost:
    """With ``rescale`` a task vector and what is left of it."""
    return whole_cost(tensor, lambda size: 2 * size) if _rescales(tensor) else piece_cost(tensor)


_trimming = partial(form, ops=(*TRIM_OPS, "axpy_n"), looks=_looks, cost=_cost)

METHODS: Mapping[str, Method] = {
    "task_arithmetic": form("task_arithmetic", task_arithmetic, SHARED),
    "ties": _trimming("ties", ties, SHARED),
    "breadcrumbs": _trimming("breadcrumbs", partial(breadcrumbs, elects=False), (*SHARED, "gamma")),
    "breadcrumbs_ties": _trimming(
        "breadcrumbs_ties", partial(breadcrumbs, elects=True), (*SHARED, "gamma")
    ),
}
