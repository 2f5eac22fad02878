"""mergekit's random numbers: torch's generator on the CPU, one for the whole merge.

mergekit seeds it once and merges tensors one after another, in the order of the names that they
have in the inputs (the largest of the inputs' names decides). So where a tensor's draws begin
depends on all tensors before it: they are walked through once before anything is merged, and each
tensor gets the generator's state at its beginning, whatever thread merges it, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import RecipeError
from pymerge.methods.protocol import EachTensor, ModelMeasuring, Question, Tensor

if TYPE_CHECKING:
    import torch

#: A state takes 5 KB: tensors with fewer draws than this share one and walk on from there.
SHARED_DRAWS = 1 << 23
#: Draws that are walked through at once.
STEP = 1 << 18
SEEDS = range(-(1 << 63), 1 << 64)


class Beginning(NamedTuple):
    """Where a tensor's draws begin: so many draws after a state."""

    state: NDArray[np.uint8]
    after: int


def deal(
    num_draws: Callable[[Tensor], int],
    take: Callable[[torch.Generator, Tensor], None] | None = None,
) -> Callable[[Sequence[Tensor]], ModelMeasuring]:
    """The model-wide measurement that finds the beginning of every tensor's draws.

    :param num_draws: how many draws of a 32-bit word a tensor takes.
    :param take: draws what a tensor takes where its words cannot be counted; then ``num_draws``
        tells only whether it draws.
    """

    def measure(tensors: Sequence[Tensor]) -> ModelMeasuring:
        check_seed(tensors)
        yield EachTensor(_nothing)  # a plan asks for the first question, which takes no time
        return _beginnings(tensors, num_draws, take)

    return measure


def _nothing(tensor: Tensor) -> Generator[Question, Any, None]:
    return
    yield


def _beginnings(
    tensors: Sequence[Tensor],
    num_draws: Callable[[Tensor], int],
    take: Callable[[torch.Generator, Tensor], None] | None,
) -> Mapping[str, Beginning]:
    import torch

    if not tensors:
        return {}
    generator = torch.Generator().manual_seed(int(tensors[0].parameters["seed"]))
    found: dict[str, Beginning] = {}
    state: NDArray[np.uint8] | None = None
    since = 0
    for tensor in sorted(tensors, key=_order):
        count = num_draws(tensor)
        if not count:
            continue
        if state is None or take is not None or since + count > SHARED_DRAWS:
            state, since = generator.get_state().numpy().copy(), 0
        found[tensor.name] = Beginning(state, since)
        since += count
        if take is None:
            skip(generator, count)
        else:
            take(generator, tensor)
    return found


def _order(tensor: Tensor) -> tuple[str, str]:
    return max(tensor.input_names, default=tensor.name), tensor.name


def generator_of(tensor: Tensor) -> torch.Generator:
    """The generator at the beginning of the tensor's draws."""
    import torch

    beginning: Beginning = tensor.state[tensor.name]
    generator = torch.Generator()
    generator.set_state(torch.from_numpy(beginning.state))
    skip(generator, beginning.after)
    return generator


def skip(generator: torch.Generator, count: int) -> None:
    """Walk through draws of one word each."""
    import torch

    scratch = torch.empty(min(count, STEP), dtype=torch.float32)
    for size in _steps(count):
        scratch[:size].uniform_(generator=generator)


def _steps(count: int) -> Iterator[int]:
    for first in range(0, count, STEP):
        yield min(STEP, count - first)


def check_seed(tensors: Sequence[Tensor]) -> None:
    """:raises RecipeError: tensors differ in the seed, or torch takes no such seed."""
    seeds = sorted({int(tensor.parameters["seed"]) for tensor in tensors})
    if len(seeds) > 1:
        raise RecipeError(
            "numerics mergekit: one generator serves the whole merge, so that seed must not vary "
            f"over tensors, found {seeds}; remove its filter"
        )
    if seeds and seeds[0] not in SEEDS:
        raise RecipeError(
            f"numerics mergekit: torch takes seeds from {SEEDS[0]} to {SEEDS[-1]}, found {seeds[0]}"
        )
