"""SMILE: upscaling to a sparse mixture of low-rank experts, Tang et al. 2024, arXiv 2408.10174.

The output is not one model but all of them: each linear layer keeps the base's weights and gains an
expert for each model, made of the task vector ``τᵢ = θᵢ − θ₀`` of its matrix by the singular value
decomposition ``τᵢ = UᵢΣᵢVᵢᵀ``. An input x goes to the experts whose leading input directions it has
most of:

- ``rᵢ = ‖V̂ᵢᵀ·x‖``, V̂ᵢ the ``gate_k`` leading columns of Vᵢ,
- ``p = softmax(r)``, of which the ``top_k`` largest stay and are made to sum to 1,
- ``y = W₀·x + b₀ + Σ pᵢ·(Ûᵢ·Σ̂ᵢV̂ᵢᵀ·x + bᵢ − b₀)``, with the ``k`` leading directions.

With ``k`` of 0 or less an expert is the whole difference (``smile.dense``) and nothing is cut.
``routing_use_diff: false`` takes the router's directions from the fine-tuned weights instead of
their differences. A layer that no model has changed (no element by more than 1e-8) stays as it is.
What is no linear layer stays the base's, or is averaged (``others: mean``).

Beside the base model lie for every such layer's weight NAME, in the output's format,
``NAME.smile.down`` [N, k, inputs] (``Σ̂V̂ᵀ``), ``NAME.smile.up`` [N, outputs, k],
``NAME.smile.router`` [N, gate_k, inputs], and the biases' differences as
``BIAS.smile.dense`` [N, outputs]; :func:`pymerge.load_smile` puts them into a model.

``svd: gram`` (default) finds the singular vectors by a float32 Gram matrix of the short side:
directions below a thousandth of the largest singular value are left out, as zeros. ``exact`` does
it in float64, to a millionth; ``randomized`` sketches twice the directions that are kept, with
three power steps (arXiv 0909.4061), for large matrices and few directions.

Presets: ``generic`` has the defaults of FusionBench's configuration (k 128, gate_k 1), ``llama``
and ``mistral`` those of its code for such models (gate_k 8, k 64 or 512), which upscales the
attention's and the MLP's projections alone.

Departures from FusionBench's code: embeddings and output heads are no layers unless ``exclude``
says so (there the head is one); directions beyond a difference's rank are zeros, where an SVD gives
arbitrary ones to the router; ``top_k`` above the number of experts takes all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.errors import RecipeError
from pymerge.methods.layout import EXCLUDE, LAYERS, TRANSPOSE, blocks_of
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    look_at_matrices,
    matrix_cost,
    merge_others,
    reads_of,
)
from pymerge.methods.parameters import by_name, preset
from pymerge.methods.protocol import (
    Applied,
    Apply,
    Cost,
    Solve,
    Solving,
    Tensor,
    Tile,
)
from pymerge.methods.registry import method
from pymerge.methods.smile_outputs import DENSE, DOWN, ROUTER, SMILE, UP
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.ops.view import View

if TYPE_CHECKING:
    import torch

#: The projections of Llama's blocks, and of the families with its names.
PROJECTIONS = r"\.(q|k|v|o|gate|up|down)_proj\.weight$"
#: What no model has changed; FusionBench's bound, numpy's and torch's "close to zero".
UNCHANGED = 1e-8
#: Of the randomized decomposition.
POWER_STEPS = 3

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "generic": {},
    "llama": {"k": 64, "gate_k": 8, "layers": PROJECTIONS},
    "mistral": {"k": 512, "gate_k": 8, "layers": PROJECTIONS},
}

SPEC = MethodSpec(
    name="smile",
    summary="Keeps all models: low-rank experts beside the base's layers, chosen for each input.",
    paper="https://arxiv.org/abs/2408.10174",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec(
            "k",
            "int",
            "shared",
            128,
            "Directions of an expert, at most all; 0 or less keeps the whole difference.",
        ),
        ParameterSpec(
            "gate_k", "int", "shared", 1, "Input directions that route to an expert.", minimum=1
        ),
        ParameterSpec("top_k", "int", "shared", 1, "Experts that an input goes to.", minimum=1),
        ParameterSpec(
            "routing_use_diff",
            "bool",
            "shared",
            True,
            "Route by the directions of the differences, not of the fine-tuned weights.",
        ),
        ParameterSpec(
            "svd",
            "str",
            "shared",
            "gram",
            "gram: by a Gram matrix in float32; exact: in float64; randomized: by a sketch.",
            choices=("gram", "exact", "randomized"),
        ),
        ParameterSpec(
            "others",
            "str",
            "shared",
            "base",
            "What the tensors of other layers become: the base's, or with the mean of their task "
            "vectors.",
            choices=("base", "mean"),
        ),
        LAYERS,
        EXCLUDE,
        TRANSPOSE,
        preset(
            "generic",
            {
                "generic": "every linear layer but the head",
                "llama": "FusionBench's for Llama and Qwen2",
                "mistral": "FusionBench's for Mistral",
            },
        ),
    ),
    statistics="tensor",
    presets=PRESETS,
)


def is_upscaled(tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a layer that gains experts."""
    module, _, last = tensor.name.rpartition(".")
    # In a file a matrix outside of any module is no layer's; one in memory has no siblings.
    is_weight = last == "weight" if module else not tensor.siblings
    return len(tensor.shape) == 2 and is_weight and bool(blocks_of(tensor))


def is_bias(tensor: Tensor) -> bool:
    """Whether a tensor is the bias of a layer that gains experts."""
    module, _, last = tensor.name.rpartition(".")
    weight = tensor.siblings.get("weight", ())
    return (
        last == "bias"
        and len(tensor.shape) == 1
        and tensor.shape[0] in weight
        and is_upscaled(replace(tensor, name=f"{module}.weight", shape=weight))
    )


def _rank(tensor: Tensor) -> int:
    """Directions of an expert; 0 for a whole difference."""
    return max(0, min(int(tensor.parameters["k"]), *tensor.shape))


def _gate_rank(tensor: Tensor) -> int:
    return min(int(tensor.parameters["gate_k"]), *tensor.shape)


def _sizes(tensor: Tensor) -> tuple[int, int]:
    """Outputs and inputs of an upscaled layer."""
    (block,) = blocks_of(tensor)
    return block.rows, block.columns


def _down(tensor: Tensor) -> tuple[int, ...] | None:
    if not is_upscaled(tensor) or not _rank(tensor):
        return None
    return tensor.num_models, _rank(tensor), _sizes(tensor)[1]


def _up(tensor: Tensor) -> tuple[int, ...] | None:
    if not is_upscaled(tensor) or not _rank(tensor):
        return None
    return tensor.num_models, _sizes(tensor)[0], _rank(tensor)


def _router(tensor: Tensor) -> tuple[int, ...] | None:
    if not is_upscaled(tensor):
        return None
    return tensor.num_models, _gate_rank(tensor), _sizes(tensor)[1]


def _is_dense(tensor: Tensor) -> bool:
    return is_bias(tensor) or (is_upscaled(tensor) and not _rank(tensor))


def _cost(tensor: Tensor) -> Cost:
    if not is_upscaled(tensor):
        return Cost()
    rank, gate = _rank(tensor), _gate_rank(tensor)
    most, how = max(rank, gate), tensor.parameters["svd"]
    routes_alone = not tensor.parameters["routing_use_diff"]

    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        short, long = sorted((rows, columns))
        kept = num_models * (rank * (rows + columns) + gate * columns) * tensor.format.num_bytes
        wide = 8 if how == "exact" else FLOAT
        # The vectors of both sides, in another order, and times the singular values.
        vectors = 3 * wide * most * (rows + columns)
        sums = num_models * (1 + int(routes_alone))
        if how == "randomized":
            width = min(2 * most, short)
            # The sketch with its factorisation; the basis and the image in float64.
            held = max(3 * FLOAT * width * (rows + columns), 8 * width * (2 * short + 2 * long))
            products = 2.0 * (2 * POWER_STEPS + 2) * rows * columns * width
            flops = products + 4.0 * POWER_STEPS * (rows + columns) * width**2
            wide_flops = 2.0 * rows * columns * width + 4.0 * long * width**2
            return Cost(
                FLOAT * rows * columns + held + vectors + kept,
                sums * flops,
                sums * wide_flops,
                sums * 9.0 * width**3,
            )
        # The Gram matrix, as float64 too, its vectors and what their solver holds.
        held = 5 * 8 * short**2 + (1024 * 8 * short if how == "exact" else 0)
        flops = 2.0 * short**2 * long + 2.0 * rows * columns * most
        exact = how == "exact"
        return Cost(
            FLOAT * rows * columns + held + vectors + kept,
            0.0 if exact else sums * flops,
            sums * flops if exact else 0.0,
            sums * 9.0 * short**3,
        )

    return matrix_cost(tensor, of_matrix)


def _looks(tensor: Tensor) -> float:
    if not is_upscaled(tensor):
        return 0.0
    single = tensor.num_models * (1 if tensor.parameters["routing_use_diff"] else 2)
    again = 0 if _rank(tensor) else tensor.num_models / (tensor.num_models + 1)
    return reads_of(tensor, deltas=single) + again


def check(tensors: Sequence[Tensor]) -> None:
    """:raises RecipeError: there is no layer that could gain experts."""
    if not any(is_upscaled(tensor) for tensor in tensors):
        raise RecipeError(
            "smile: expected weights of linear layers (matrices called weight), found none among "
            f"{len(tensors)} tensors; change layers or exclude, or the model"
        )


@method(
    SPEC,
    ops=TILE_OPS,
    looks=_looks,
    cost=_cost,
    extras=(
        DOWN._replace(shape=_down),
        UP._replace(shape=_up),
        ROUTER._replace(shape=_router),
        DENSE._replace(where=_is_dense),
    ),
    check=check,
    description=SMILE,
)
def smile(tensor: Tensor) -> Apply | Solving:
    """Decompose each model's difference; the result is the base with the factors beside it."""
    if is_upscaled(tensor):
        return _upscale(tensor)
    return _differences(tensor) if is_bias(tensor) else merge_others(tensor, 1.0)


def _differences(tensor: Tensor, nonfinite: int = 0) -> Apply:
    """The base, and the models' whole differences beside it."""
    ops = tensor.ops

    def run(tile: Tile, out: View, *extras: Sequence[View]) -> Applied:
        count = ops.convert(out, tile.base)
        for rows in extras:
            for row, model in zip(rows, tile.models, strict=True):
                count += ops.axpy_n(row, (model,), [1.0], base=tile.base, add_base=False)
        # What stands beside is counted with the first tile.
        return Applied(count + (nonfinite if tile.start == 0 else 0))

    return Apply(run)


def _upscale(tensor: Tensor) -> Solving:
    def visit(matrix: Matrix) -> Asking:
        found = _Experts(tensor, matrix)
        for model in range(tensor.num_models):
            yield from found.add(model)
        return found

    (experts,) = yield from look_at_matrices(tensor, visit)
    apply = _differences(tensor, experts.nonfinite())
    return replace(
        apply,
        values=lambda tiles: [float(experts.changed)],
        models=() if _rank(tensor) else None,
        wholes=experts.wholes(),
    )


class _Experts:
    """The factors of a layer's experts, as they come, in the output's format."""

    def __init__(self, tensor: Tensor, matrix: Matrix) -> None:
        import torch

        self.changed = False
        self._tensor, self._matrix = tensor, matrix
        self._rank, self._gate = _rank(tensor), _gate_rank(tensor)
        dtype = getattr(torch, str(tensor.format.torch_name))
        shapes = {DOWN: _down(tensor), UP: _up(tensor), ROUTER: _router(tensor)}
        self._parts = {
            extra.suffix: torch.zeros(shape, dtype=dtype)
            for extra, shape in shapes.items()
            if shape is not None
        }

    def add(self, model: int) -> Asking:
        """Ask for one model's matrix and decompose it."""
        delta = yield from self._matrix.delta(model)
        by_difference = bool(self._tensor.parameters["routing_use_diff"])
        yield Solve(partial(self._split, model, delta, by_difference))
        if by_difference:
            return
        del delta
        weight = yield from self._matrix.weight(model)
        yield Solve(partial(self._decompose, model, weight, 0, True))

    def _split(self, model: int, delta: torch.Tensor, routes: bool) -> None:
        low, high = delta.aminmax()
        if not max(-float(low), float(high)) <= UNCHANGED:
            self.changed = True
        self._decompose(model, delta, self._rank, routes)

    def _decompose(self, model: int, x: torch.Tensor, rank: int, routes: bool) -> None:
        """Keep the leading directions of x, of which nothing is left."""
        from pymerge.ops.matrix.spectrum import power_of_two, truncated_svd

        how = str(self._tensor.parameters["svd"])
        scale = power_of_two(x)
        most = max(rank, self._gate if routes else 0)
        if not most or scale == 0:
            return
        if scale == scale:
            x /= scale  # exact, and spares the decomposition a copy
        found = truncated_svd(
            x,
            most,
            self._matrix.ws,
            route="randomized" if how == "randomized" else "gram",
            dtype="float64" if how == "exact" else "float32",
            power_steps=POWER_STEPS,
        )
        num = min(rank, len(found.values))
        if num:
            values = found.values[:num] * (scale if scale == scale else 1.0)
            self._put(DOWN.suffix, model, values[:, None].to(found.right.dtype) * found.right[:num])
            self._parts[UP.suffix][model, :, :num] = found.left[:, :num].cpu()
        if routes:
            self._put(ROUTER.suffix, model, found.right[: self._gate])

    def _put(self, suffix: str, model: int, rows: torch.Tensor) -> None:
        self._parts[suffix][model, : len(rows)] = rows.cpu()

    def nonfinite(self) -> int:
        """Elements of the factors that are not finite."""
        return sum(int(part.isfinite().logical_not_().sum()) for part in self._parts.values())

    def wholes(self) -> dict[str, Any]:
        """The bytes of the factors by their suffix."""
        import torch

        return {name: part.view(torch.uint8).numpy() for name, part in self._parts.items()}
