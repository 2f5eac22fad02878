"""dare and della, step by step as mergekit takes them, with the masks of torch's generator.

The masks of a tensor are drawn at once, model after model, and kept until it is merged, a byte for
each element. A bfloat16 task vector is masked and rescaled in bfloat16, float16 in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.errors import RecipeError
from pymerge.formats import BF16, F32, Format
from pymerge.methods.protocol import Cost, Method, Question, Solve, Solving, Tensor
from pymerge.methods.stepwise.draws import deal, generator_of
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import Piece, dtype_of
from pymerge.methods.stepwise.sparse import SHARED, l1_factor, merge_sparse
from pymerge.methods.stepwise.whole import chunks, gather_delta, whole_cost

if TYPE_CHECKING:
    import torch

#: Elements that are ranked at once, or the rows of one index of the first dimension.
RANKED = 1 << 18
#: What ranking holds for each of them: magnitudes, their sorted copy, indices, probabilities.
RANKED_BYTES = 32


class Masked(NamedTuple):
    """What stays of a model's task vector: bool [num_elements], and the factor on it."""

    mask: torch.Tensor
    factor: torch.Tensor | None


Draw = Callable[["torch.Tensor", "torch.Generator"], "torch.Tensor"]


def dare(tensor: Tensor, *, elects: bool) -> Solving:
    """Each element stays with the probability ``density``."""
    draws = [partial(_bernoulli, tensor, each) for each in tensor.each("density")]
    return _drop_and_merge(tensor, draws, _draws_dare(tensor), elects)


def della(tensor: Tensor, *, elects: bool) -> Solving:
    """Small elements stay with a lower probability than large ones of their row."""
    draws = [
        partial(_by_rank, tensor, density, epsilon)
        for density, epsilon in zip(tensor.each("density"), tensor.each("epsilon"), strict=True)
    ]
    return _drop_and_merge(tensor, draws, _draws_della(tensor), elects)


def _drop_and_merge(
    tensor: Tensor, draws: Sequence[Draw], drawn: Sequence[bool], elects: bool
) -> Solving:
    densities = tensor.each("density")
    work = dtype_of(_work(tensor))
    masks: list[Masked | None] = [None] * tensor.num_models
    if any(drawn) and tensor.num_elements:
        generator = yield Solve(partial(generator_of, tensor))
        for model, draw in enumerate(draws):
            if drawn[model]:
                masks[model] = yield from _mask(tensor, model, draw, generator)

    def sparse(model: int, piece: Piece, delta: torch.Tensor) -> torch.Tensor:
        masked = masks[model]
        if masked is None:
            return delta if densities[model] >= 1 else delta.zero_()
        mask = masked.mask[piece.start : piece.start + piece.num]
        left = delta.to(work) * mask
        return (left if masked.factor is None else left * masked.factor).to(delta.dtype)

    return merge_sparse(tensor, sparse, elects=elects)


def _mask(
    tensor: Tensor, model: int, draw: Draw, generator: torch.Generator
) -> Generator[Question, Any, Masked]:
    delta = yield from gather_delta(tensor, model)
    masked: Masked = yield Solve(partial(_drawn, tensor, draw, generator, delta))
    return masked


def _drawn(tensor: Tensor, draw: Draw, generator: torch.Generator, delta: torch.Tensor) -> Masked:
    import torch

    mask = draw(delta, generator)
    if not tensor.parameters["rescale"]:
        return Masked(mask, None)
    delta = delta.to(dtype_of(_work(tensor)))
    masked = torch.empty_like(delta)
    for part in chunks(tensor):
        masked[part] = delta[part] * mask[part]
    return Masked(mask, l1_factor(delta, masked))


def _bernoulli(
    tensor: Tensor, density: float, delta: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    import torch

    mask = torch.empty(len(delta), dtype=torch.bool)
    for part in chunks(tensor):
        size = part.stop - part.start
        chances = torch.full((size,), density, dtype=dtype_of(_work(tensor)))
        mask[part] = torch.bernoulli(chances, generator=generator).bool()
    return mask


def _by_rank(
    tensor: Tensor, density: float, epsilon: float, delta: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Ranks are those of torch's sort, as mergekit's, equal magnitudes included."""
    import torch

    work = dtype_of(_work(tensor))
    shape = _ranked_shape(tensor)
    by_rank = _chances(shape[1], density, epsilon, work).view(1, -1, *[1] * (len(shape) - 2))
    mask = torch.empty(shape, dtype=torch.bool)
    magnitudes = delta.view(shape)
    step = _rows_at_once(shape)
    for first in range(0, shape[0], step):
        rows = slice(first, first + step)
        order = torch.argsort(magnitudes[rows].abs(), dim=1)
        chances = torch.empty(order.shape, dtype=work)
        chances.scatter_(1, order, by_rank.expand(order.shape))
        mask[rows] = torch.bernoulli(chances, generator=generator).bool()
    return mask.view(-1)


def _chances(columns: int, density: float, epsilon: float, work: torch.dtype) -> torch.Tensor:
    """The probability of each rank; ranks are rounded to the format, as mergekit's are."""
    import torch

    ranks = torch.arange(columns).to(work) + 1
    place = ((ranks - ranks.min()) / (ranks.max() - ranks.min())).clamp(0, 1)
    return (density - epsilon) + place * 2 * epsilon


def _ranked_shape(tensor: Tensor) -> tuple[int, ...]:
    """Ranks run along the second dimension; a vector is one row."""
    return tensor.shape if len(tensor.shape) > 1 else (1, tensor.num_elements)


def _rows_at_once(shape: tuple[int, ...]) -> int:
    row = 1
    for extent in shape[1:]:
        row *= extent
    return max(1, RANKED // max(1, row))


def _work(tensor: Tensor) -> Format:
    return BF16 if tensor.working is BF16 else F32


def _draws_dare(tensor: Tensor) -> list[bool]:
    return [density < 1 for density in tensor.each("density")]


def _draws_della(tensor: Tensor) -> list[bool]:
    return [0 < density < 1 for density in tensor.each("density")]


def _check_della(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        drawn = _draws_della(tensor)
        if any(drawn) and tensor.num_elements and _ranked_shape(tensor)[1] == 1:
            raise RecipeError(
                f"numerics mergekit: tensor {tensor.name!r} {list(tensor.shape)} has one element "
                "in each row, which mergekit's della cannot rank; give it density: 1 by a filter, "
                "or leave --numerics out"
            )
        for model, (density, epsilon) in enumerate(
            zip(tensor.each("density"), tensor.each("epsilon"), strict=True)
        ):
            if drawn[model] and (density + epsilon >= 1 or density - epsilon <= 0):
                raise RecipeError(
                    f"della: density ± epsilon must lie between 0 and 1, found {density:g} ± "
                    f"{epsilon:g} for tensor {tensor.name!r}; change one of them"
                )


def _cost(tensor: Tensor, num_drawn: int, ranks: bool) -> Cost:
    """The masks, a task vector, and where it is rescaled what is left of it, both in the format of
    the work; and the rows that are ranked at once."""
    work = _work(tensor).num_bytes
    rescales = bool(tensor.parameters["rescale"])

    def held(size: int) -> float:
        if not num_drawn:
            return 0.0
        spent = 2 * work + (size if work != size else 0) if rescales else size
        return num_drawn + spent

    cost = whole_cost(tensor, held)
    if not ranks or not num_drawn:
        return cost
    shape = _ranked_shape(tensor)
    row = tensor.num_elements // max(1, shape[0])
    at_once = min(tensor.num_elements, _rows_at_once(shape) * row)
    return cost._replace(num_bytes=cost.num_bytes + RANKED_BYTES * at_once)


def _form(name: str, merge: Callable[..., Solving], *, elects: bool, ranks: bool) -> Method:
    drawn = _draws_della if ranks else _draws_dare

    def num_draws(tensor: Tensor) -> int:
        return tensor.num_elements * sum(drawn(tensor))

    return form(
        name,
        partial(merge, elects=elects),
        (*SHARED, "seed", "epsilon") if ranks else (*SHARED, "seed"),
        looks=lambda tensor: 2 * sum(drawn(tensor)) / (tensor.num_models + 1),
        cost=lambda tensor: _cost(tensor, sum(drawn(tensor)), ranks),
        check=_check_della if ranks else lambda tensors: None,
        draws=lambda tensor: num_draws(tensor) > 0,
        measure_model=deal(num_draws),
    )


METHODS: Mapping[str, Method] = {
    "dare_linear": _form("dare_linear", dare, elects=False, ranks=False),
    "dare_ties": _form("dare_ties", dare, elects=True, ranks=False),
    "della_linear": _form("della_linear", della, elects=False, ranks=True),
    "della": _form("della", della, elects=True, ranks=True),
}
