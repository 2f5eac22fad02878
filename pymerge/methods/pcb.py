"""PCB-Merging: parameter competition balancing, Du et al. 2024, arXiv 2410.02396.

For each model, with N models and d elements in the whole model:

1. ``aᵢ = |τᵢ|`` clipped to its own values at ranks ``int(d·q)`` and ``int(d·(1−q)−1)`` in ascending
   order, ``tᵢ = sign(τᵢ)·aᵢ``, and ``nᵢ`` = ``aᵢ`` scaled to 0 ... 1.
2. ``scoreᵢ = exp(N·nᵢ²)·interᵢ``: how much the element matters within the model times how far it
   agrees with the others.
3. ``κᵢ`` = the score clipped to its values at ranks ``int(d·(1−ratio))`` and last, scaled to 0 ...
   1: all but the best ``ratio`` are dropped, and the borderline ones weigh next to nothing.
4. ``out = θ₀ + λ·Σ wᵢ·κᵢ·tᵢ / max(Σ κᵢ, 1e−12)``.

``inter_mode: raw`` takes ``interᵢ = tanh(τᵢ·Σⱼ τⱼ)``, as the authors' published snippet does, which
is the default; ``normalized`` ``tanh(τᵢ·Σⱼ sⱼ)`` with ``sⱼ = sign(τⱼ)·nⱼ``, ``pairwise`` ``Σⱼ
tanh(sᵢ·sⱼ)``, as two variants of their vision code do (with ``q: 0.01`` and ``ratio: 0.05``). The
paper writes a softmax and a plain mask where the code has the exponential and the scaled scores.
The four ranks of each model are exact, found in four looks at the inputs before the merge reads
them again; where fewer than ``ratio`` of the scores are positive, two looks more. ``scope: tensor``
ranks each tensor alone, which is another method but reads a tensor that fits in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymerge.errors import PymergeError, RecipeError
from pymerge.methods.parameters import LAMBDA, by_name
from pymerge.methods.protocol import Apply, Measure, Measuring, Tensor, Tile, remembered
from pymerge.methods.registry import method
from pymerge.methods.spec import MethodSpec, ParameterSpec
from pymerge.methods.trim import MODEL_KEY_OPS, model_keys

SPEC = MethodSpec(
    name="pcb",
    summary="Mean of the task vectors weighted by how elements compete within and between models.",
    paper="https://arxiv.org/abs/2410.02396",
    base="required",
    min_models=1,
    # N·exp(N), the largest score of inter_mode: pairwise, leaves float32 beyond.
    max_models=84,
    parameters=by_name(
        ParameterSpec(
            "weight", "float", "model", 1.2, "Factor on the model's share; 1.2 is the authors'."
        ),
        ParameterSpec(
            "ratio",
            "float",
            "shared",
            0.1,
            "Share of the elements whose scores count, largest first.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "q",
            "float",
            "shared",
            1e-4,
            "Share of the smallest and of the largest magnitudes that are clipped.",
            minimum=0.0,
            maximum=0.5,
        ),
        ParameterSpec(
            "inter_mode",
            "str",
            "shared",
            "raw",
            "How the agreement between models is scored.",
            choices=("raw", "normalized", "pairwise"),
        ),
        ParameterSpec(
            "scope",
            "str",
            "shared",
            "model",
            "Rank magnitudes and scores over the whole model (the authors) or within each tensor.",
            choices=("model", "tensor"),
        ),
        LAMBDA,
    ),
    statistics="tensor or model",
)

#: Looks at the data before the merge.
LOOKS = 4
#: Elements scored at once, so that their scores stay in cache.
PIECE = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Per model: the bounds of the magnitudes and of the scores."""

    lows: list[float]
    highs: list[float]
    cuts: list[float]
    tops: list[float]


Limiting = Generator[Measure, Any, Limits]


def _is_model_wide(tensor: Tensor) -> bool:
    return tensor.parameters["scope"] == "model"


def measure_model(tensors: Sequence[Tensor]) -> Limiting:
    """The limits over the whole model: all its tensors are ranked together."""
    first = tensors[0]
    if len({tuple(tensor.model_names) for tensor in tensors}) > 1:
        raise RecipeError(
            "pcb with scope: model ranks all tensors of a model together: every model must have "
            "every tensor; leave out --allow-missing or use scope: tensor"
        )
    for name in ("q", "ratio", "inter_mode", "scope"):
        values = {tensor.parameters[name] for tensor in tensors}
        if len(values) > 1:
            raise RecipeError(
                f"pcb with scope: model ranks a whole model at once, so {name} must not vary over "
                f"tensors, found {sorted(values, key=str)}; remove its gradient or filter or use "
                "scope: tensor"
            )
    return (yield from _limits(first, sum(tensor.num_elements for tensor in tensors)))


@method(
    SPEC,
    ops=(*MODEL_KEY_OPS, "pcb_score", "pcb_merge"),
    looks=lambda tensor: 0 if _is_model_wide(tensor) else LOOKS,
    model_wide=_is_model_wide,
    measure_model=measure_model,
    model_looks=LOOKS,
)
def pcb(tensor: Tensor) -> Measuring:
    """Measure the bounds of magnitudes, then of scores; one fused pass applies them."""
    limits = tensor.state
    if not _is_model_wide(tensor):
        limits = yield from _limits(tensor, tensor.num_elements)
    weights, scale = tensor.each("weight"), float(tensor.parameters["lambda"])
    mode = str(tensor.parameters["inter_mode"])
    return Apply(
        lambda tile, out: tensor.ops.pcb_merge(
            out,
            tile.base,
            tile.models,
            limits.lows,
            limits.highs,
            limits.cuts,
            limits.tops,
            weights,
            mode=mode,
            scale=scale,
        )
    )


def _limits(tensor: Tensor, total: int) -> Limiting:
    """The limits over ``total`` elements, with the parameters of ``tensor``."""
    key = ("limits", total, *(tensor.parameters[name] for name in ("q", "ratio", "inter_mode")))
    return remembered(tensor, key, lambda: _measure_limits(tensor, total))


def _measure_limits(tensor: Tensor, total: int) -> Limiting:
    num, names = tensor.num_models, tensor.model_names
    if total == 0:
        zeros = [0.0] * num
        return Limits(zeros, zeros, zeros, zeros)
    q, ratio = float(tensor.parameters["q"]), float(tensor.parameters["ratio"])
    ranks = [_from_top(int(total * q), total), _from_top(int(total * (1 - q) - 1), total)]
    bounds = yield from _values(tensor, ranks, range(num))
    lows, highs = ([values[end] for values in bounds] for end in (0, 1))
    for name, high in zip(names, highs, strict=True):
        _check_finite(high, name)
    cut = int(total * (1 - ratio))
    ranks = [_from_top(cut, total), 1]
    scores = yield from _values(tensor, ranks, range(num), _scored(tensor, lows, highs, 1))
    for name, (_, top) in zip(names, scores, strict=True):
        _check_finite(top, name)
    # A value of 0 among the positive parts may stand for a negative score.
    unsure = [index for index, values in enumerate(scores) if min(values) == 0]
    if unsure:
        from_bottom = [min(cut + 1, total), total]
        scored = _scored(tensor, lows, highs, -1)
        negative = yield from _values(tensor, from_bottom, unsure, scored)
        for index, below in zip(unsure, negative, strict=True):
            pairs = zip(scores[index], below, strict=True)
            scores[index] = [value if value > 0 else 0.0 - minus for value, minus in pairs]
    cuts, tops = ([values[end] for values in scores] for end in (0, 1))
    return Limits(lows, highs, cuts, tops)


def _from_top(index: int, total: int) -> int:
    """The rank, 1 for the largest, of an index in ascending order."""
    return total - min(max(index, 0), total - 1)


def _values(
    tensor: Tensor,
    ranks: Sequence[int],
    models: Sequence[int],
    ranked: Callable[[Tile], Iterator[Tile]] | None = None,
) -> Generator[Measure, Any, list[list[float]]]:
    """For each model the values at the ranks, counted from the largest."""
    asked = [model for model in models for _ in ranks]
    ranked = _unchanged if ranked is None else ranked
    keys = yield from model_keys(tensor.ops, list(ranks) * len(models), asked, ranked=ranked)
    values = np.array(keys, np.int32).view(np.float32).astype(float)
    found: list[list[float]] = values.reshape(len(models), len(ranks)).tolist()
    return found


def _unchanged(tile: Tile) -> Iterator[Tile]:
    yield tile


def _scored(
    tensor: Tensor, lows: list[float], highs: list[float], part: int
) -> Callable[[Tile], Iterator[Tile]]:
    """Makes of a tile the scores of every model, of one sign, the others 0."""
    ops, num, mode = tensor.ops, tensor.num_models, str(tensor.parameters["inter_mode"])

    def ranked(tile: Tile) -> Iterator[Tile]:
        buffers = [ops.buffer(min(PIECE, tile.num)) for _ in range(num)]
        for _, piece in tile.pieces(PIECE):
            scores = tuple(buffer.view.part(0, piece.num) for buffer in buffers)
            for index, out in enumerate(scores):
                ops.pcb_score(
                    out, piece.base, piece.models, index, lows, highs, mode=mode, part=part
                )
            yield Tile(piece.start, piece.num, None, scores)

    return ranked


def _check_finite(value: float, model: str) -> None:
    if not np.isfinite(value):
        raise PymergeError(
            f"pcb: the values that rank {model} are not finite: it, the base or another model "
            "holds NaN or infinite elements; look for them with `pymerge inspect --check`"
        )
