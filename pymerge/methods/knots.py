"""KnOTS: task vectors merged in the singular basis that they share, Stoica et al. 2024, arXiv
2410.19735.

For each matrix with the task vectors side by side, ``[τ₁ … τ_N] = U·Σ·[V₁ᵀ … V_Nᵀ]``, model i has
the coordinates ``Zᵢ = Σ·Vᵢᵀ = Uᵀ·τᵢ``. These are merged element by element, where tasks that were
trained apart (adapters above all) agree more than their weights do, and turned back:
``out = θ₀ + λ·U·merge(w₁·Z₁ … w_N·Z_N)``.

``elementwise: ties`` keeps of each Zᵢ what reaches the (⌊density·d⌋ + 1)-th largest magnitude,
elects each element's sign by the sum and merges those that agree; ``scope: model`` (the authors)
ranks the coordinates of all matrices together, ``scope: tensor`` those of each matrix.
``dare_ties`` keeps elements with probability ``density``, divided by it, and elects and merges
likewise.
``merge: mean`` divides by the number of those that agree. ``task_arithmetic`` sums: U cancels, and
the sum of the task vectors is taken as it is.

``concat: outputs`` puts the task vectors below one another, so that V is shared instead.

U are the eigenvectors of ``Σ τᵢ·τᵢᵀ`` in float64, of adapters in the space that their factors span;
no m × Nn matrix is decomposed. Directions with ``σ ≤ cut·σ₁`` are dropped, ``cut_is: absolute``
compares with the cut itself as the authors do (``1e-5``). They count: with more directions the
same density keeps more. Signs of the singular vectors do not matter. Where singular values are
equal their vectors are arbitrary up to a rotation, and so is what is merged of them.

``preset: official`` is the authors' ViT-B/32 configuration (ties, ``lambda: 0.6``),
``official_dare`` that with DARE. Departures from their code: adapters are scaled by α/r, which
theirs leaves out; a vote of exactly zero elects nothing, since the sign of most elements, which it
gives there, depends on the signs of the singular vectors; masks are Philox draws by seed, tensor
and model.

With ``scope: model`` the inputs are read three times. Between the reads a matrix keeps U alone, in
a scratch file in the output folder: 8 bytes for each element of [m, k], k directions at most m or N
times n or the sum of the ranks. The coordinates of all models of a matrix are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pymerge.errors import RecipeError
from pymerge.methods.key_counts import COUNT_OPS, KeyCounts, rank_of
from pymerge.methods.layout import LAYOUT, blocks_of
from pymerge.methods.matrices import (
    FLOAT,
    TILE_OPS,
    Asking,
    Matrix,
    look_at_matrices,
    matrix_cost,
    merge_matrices,
    others,
    reads_of,
    view_of,
)
from pymerge.methods.parameters import LAMBDA, by_name, preset
from pymerge.methods.protocol import (
    Apply,
    Cost,
    EachTensor,
    ModelMeasuring,
    Question,
    Solve,
    Solving,
    Store,
    Tensor,
)
from pymerge.methods.randomness import key
from pymerge.methods.registry import method
from pymerge.methods.sparsify import SEED
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.ops.selection import ALL_DRAWS, Keep

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

DOUBLE = 8
#: Elements of a matrix that are counted or merged at a time.
PIECE = 1 << 18

PRESETS: Mapping[str, Mapping[str, ParameterValue]] = {
    "pymerge": {},
    "official": {"lambda": 0.6, "cut": 1e-5, "cut_is": "absolute"},
    "official_dare": {
        "elementwise": "dare_ties",
        "density": 0.9,
        "lambda": 0.7,
        "cut": 1e-5,
        "cut_is": "absolute",
    },
}

SPEC = MethodSpec(
    name="knots",
    summary="Task vectors merged element by element in the singular basis that they share.",
    paper="https://arxiv.org/abs/2410.19735",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(
        ParameterSpec("weight", "float", "model", 1.0, "Factor on the model's coordinates."),
        LAMBDA,
        ParameterSpec(
            "elementwise",
            "str",
            "shared",
            "ties",
            "How the coordinates are merged.",
            choices=("ties", "dare_ties", "task_arithmetic"),
        ),
        ParameterSpec(
            "density",
            "float",
            "model",
            0.2,
            "Share of the coordinates that is kept: the largest of them, by dare_ties any.",
            minimum=0.0,
            maximum=1.0,
        ),
        ParameterSpec(
            "scope",
            "str",
            "shared",
            "model",
            "Rank the coordinates of all matrices together (the authors) or of each alone.",
            choices=("model", "tensor"),
        ),
        ParameterSpec(
            "merge",
            "str",
            "shared",
            "mean",
            "What becomes of the coordinates that agree.",
            choices=("mean", "sum"),
        ),
        ParameterSpec(
            "concat",
            "str",
            "shared",
            "inputs",
            "Along which side the task vectors are put together: the basis is that of the other.",
            choices=("inputs", "outputs"),
        ),
        ParameterSpec(
            "cut",
            "float",
            "shared",
            1e-9,
            "Directions with smaller singular values are dropped.",
            minimum=0.0,
        ),
        ParameterSpec(
            "cut_is",
            "str",
            "shared",
            "relative",
            "Whether the cut is a share of the largest singular value or itself one.",
            choices=("relative", "absolute"),
        ),
        SEED,
        others("mean"),
        *LAYOUT,
        preset(
            "pymerge",
            {
                "pymerge": "the relative cut, lambda 1",
                "official": "the authors' ViT-B/32 with ties",
                "official_dare": "the authors' ViT-B/32 with dare_ties",
            },
        ),
    ),
    statistics="tensor or model",
    presets=PRESETS,
)


class Aligned(NamedTuple):
    """A basis float64 [a, k], and every model's coordinates in it, float32 [k, b]. The basis is NaN
    where a task vector is not finite."""

    basis: torch.Tensor
    coordinates: list[torch.Tensor]

    @property
    def is_finite(self) -> bool:
        return not self.basis.numel() or math.isfinite(float(self.basis[0, 0]))

    @property
    def num_elements(self) -> int:
        return self.coordinates[0].numel() if self.is_finite else 0


def _how(tensor: Tensor) -> str:
    return str(tensor.parameters["elementwise"])


def _is_model_wide(tensor: Tensor) -> bool:
    return _how(tensor) == "ties" and tensor.parameters["scope"] == "model"


def _by_inputs(tensor: Tensor) -> bool:
    return tensor.parameters["concat"] == "inputs"


def _cost(tensor: Tensor) -> Cost:
    def of_matrix(rows: int, columns: int, num_models: int) -> Cost:
        whole = rows * columns
        if _how(tensor) == "task_arithmetic":
            return Cost(2 * FLOAT * whole)
        side, along = (rows, columns) if _by_inputs(tensor) else (columns, rows)
        most = min(side, num_models * along)
        taus, each = FLOAT * num_models * whole, FLOAT * most * along
        # The Gram matrix with a chunk of converted columns, or with its vectors and their solver.
        find = taus + DOUBLE * max(5 * side**2, side**2 + side * min(along, 1024))
        # Task vectors that become coordinates one by one, which may lose directions once more.
        turn = max(taus, num_models * each) + each + FLOAT * whole + 2 * DOUBLE * side * most
        merge = (num_models + 1) * each + DOUBLE * side * most
        expand = each + FLOAT * whole + 2 * DOUBLE * side * most
        double = num_models * (1.0 * side**2 * along + 2.0 * most * whole) + 2.0 * most * whole
        return Cost(max(find, turn, merge, expand), 0.0, double, 9.0 * side**3)

    return matrix_cost(tensor, of_matrix)


def measure_model(tensors: Sequence[Tensor]) -> ModelMeasuring:
    """The keys of the thresholds over the coordinates of all matrices; every basis is kept."""
    first = tensors[0]
    if len({tuple(tensor.model_names) for tensor in tensors}) > 1:
        raise RecipeError(
            "knots with scope: model ranks the coordinates of a whole model together: every model "
            "must have every tensor; leave out --allow-missing or use scope: tensor"
        )
    for name in ("elementwise", "scope"):
        words = {str(tensor.parameters[name]) for tensor in tensors}
        if len(words) > 1:
            raise RecipeError(
                f"knots with scope: model ranks a whole model at once, so {name} must not vary "
                f"over tensors, found {sorted(words)}; remove its filter or use scope: tensor"
            )
    densities = first.each("density")
    for tensor in tensors:
        if tensor.each("density") != densities:
            raise RecipeError(
                "knots with scope: model ranks a whole model at once, so density must not vary "
                f"over tensors: {first.name!r} has {densities}, {tensor.name!r} has "
                f"{tensor.each('density')}; remove the gradient or filter from density or use "
                "scope: tensor"
            )
    counts = KeyCounts(first.num_models)
    sizes = yield EachTensor(partial(_first_look, counts))
    counts.narrow([rank_of(density, sum(sizes.values())) for density in densities])
    yield EachTensor(partial(_second_look, counts))
    return counts.keys()


def _first_look(counts: KeyCounts, tensor: Tensor) -> Generator[Question, Any, int]:
    def visit(matrix: Matrix) -> Asking:
        aligned: Aligned = yield from align(matrix)

        def keep() -> int:
            _store(tensor).put(_name(matrix), aligned.basis.cpu().numpy())
            _count(counts, aligned, matrix)
            return aligned.num_elements

        return (yield Solve(keep))

    sizes: list[int] = yield from look_at_matrices(tensor, visit)
    return sum(sizes)


def _second_look(counts: KeyCounts, tensor: Tensor) -> Generator[Question, Any, None]:
    def visit(matrix: Matrix) -> Asking:
        aligned = yield from _aligned_as_kept(matrix)
        yield Solve(lambda: _count(counts, aligned, matrix))

    yield from look_at_matrices(tensor, visit)


def _store(tensor: Tensor) -> Store:
    if tensor.store is None:
        raise RuntimeError(f"{tensor.name}: nothing is kept while a plan is made")
    return tensor.store


def _number(matrix: Matrix) -> int:
    return blocks_of(matrix.tensor).index(matrix.block)


def _name(matrix: Matrix) -> str:
    return f"{matrix.tensor.name}[{_number(matrix)}]"


def _count(counts: KeyCounts, aligned: Aligned, matrix: Matrix) -> None:
    """Count the magnitudes of the coordinates; those that are not finite do not count."""
    if not aligned.is_finite:
        return
    ops = matrix.tensor.ops
    for model, z in enumerate(aligned.coordinates):
        view, rows = view_of(z), slice(model, model + 1)

        def piece(part: slice, view: Any = view, rows: slice = rows) -> None:
            values = view.part(part.start, part.stop - part.start)
            counts.add(counts.count(ops, [(None, [values])], rows), rows)

        matrix.ws.map(piece, matrix.ws.panels(z.numel(), PIECE))


@method(
    SPEC,
    ops=(*TILE_OPS, *COUNT_OPS, "disjoint_merge"),
    looks=lambda tensor: (
        reads_of(tensor, totals=1)
        if _how(tensor) == "task_arithmetic"
        else reads_of(tensor, deltas=tensor.num_models)
    ),
    model_wide=_is_model_wide,
    measure_model=measure_model,
    model_looks=4,
    cost=_cost,
)
def knots(tensor: Tensor) -> Apply | Solving:
    """Turn the task vectors into the basis that they share, merge there, turn back."""

    def solve(matrix: Matrix) -> Asking:
        if _how(tensor) == "task_arithmetic":
            return (yield from matrix.total(tensor.each("weight")))
        if _is_model_wide(tensor):
            aligned = yield from _aligned_as_kept(matrix)
        else:
            aligned = yield from align(matrix)
        return (yield Solve(partial(_merge, aligned, matrix)))

    return merge_matrices(tensor, solve)


def align(matrix: Matrix) -> Asking:
    """The :class:`Aligned` task vectors of a matrix."""
    if matrix.factors is not None:
        return (yield Solve(partial(_align_factors, matrix)))
    taus: list[torch.Tensor] = []
    for model in range(matrix.num_models):
        taus.append((yield from matrix.delta(model)))
    return (yield Solve(partial(_align_dense, taus, matrix)))


def _aligned_as_kept(matrix: Matrix) -> Asking:
    """The same with the basis that a look at the model kept."""

    def basis() -> torch.Tensor:
        import torch

        return torch.from_numpy(_store(matrix.tensor).get(_name(matrix))).to(matrix.ws.device)

    kept = yield Solve(basis)
    coordinates = []
    for model in range(matrix.num_models):
        if matrix.factors is not None:
            pair = _turned(matrix)[model]
            z = yield Solve(partial(_product_of_factors, kept, pair, matrix.ws))
        else:
            tau = yield from matrix.delta(model)
            z = yield Solve(partial(_product, kept, tau, matrix))
            del tau
        coordinates.append(z)
    return Aligned(kept, coordinates)


def _align_dense(taus: list[torch.Tensor], matrix: Matrix) -> Aligned:
    """Uses the task vectors up."""
    from pymerge.ops.matrix.gram import gram_acc
    from pymerge.ops.matrix.spectrum import gram_eigh

    ws = matrix.ws
    by_inputs = _by_inputs(matrix.tensor)
    side, along = (matrix.rows, matrix.columns) if by_inputs else (matrix.columns, matrix.rows)
    gram = ws.zeros(side, side, dtype="float64")
    for tau in taus:
        gram_acc(gram, tau, ws, side="rows" if by_inputs else "columns", backend="torch")
    vectors = gram_eigh(gram, ws).vectors[:, : min(side, len(taus) * along)].contiguous()
    del gram, tau
    coordinates = []
    while taus:
        coordinates.append(_product(vectors, taus.pop(0), matrix))
    return _without_empty(vectors, coordinates, matrix)


def _align_factors(matrix: Matrix) -> Aligned:
    """The same of adapters: the basis lies in what their factors on its side span."""
    import torch

    from pymerge.ops.matrix.gram import gram_acc
    from pymerge.ops.matrix.spectrum import gram_eigh

    ws, pairs = matrix.ws, _turned(matrix)
    if not all(bool(torch.isfinite(factor).all()) for pair in pairs for factor in pair):
        return _not_finite(matrix, pairs[0][0].shape[0])
    span, upper = torch.linalg.qr(torch.cat([left.double() for left, _ in pairs], dim=1))
    gram = ws.zeros(upper.shape[0], upper.shape[0], dtype="float64")
    first = 0
    for left, right in pairs:
        part = upper[:, first : first + left.shape[1]]
        wide = right.double()
        inner = ws.zeros(len(right), len(right), dtype="float64")
        gram_acc(inner, wide, ws, side="rows", backend="torch")
        gram += part @ inner @ part.t()
        first += left.shape[1]
    most = min(len(gram), sum(min(right.shape) for _, right in pairs))
    vectors = ws.matmul(span, gram_eigh(gram, ws).vectors[:, :most].contiguous())
    coordinates = [_product_of_factors(vectors, pair, ws) for pair in pairs]
    return _without_empty(vectors, coordinates, matrix)


def _turned(matrix: Matrix) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors with the side of the basis first."""
    pairs = matrix.factors or ()
    if _by_inputs(matrix.tensor):
        return list(pairs)
    return [(right.t(), left.t()) for left, right in pairs]


def _product(basis: torch.Tensor, tau: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """``Uᵀ·τ`` (or ``Uᵀ·τᵀ``) in float64, rounded once to float32."""
    from pymerge.ops.matrix.products import product

    turned = tau.t() if _by_inputs(matrix.tensor) else tau
    out = matrix.ws.empty(basis.shape[1], len(turned))
    product(turned, basis, matrix.ws, out=out.t())
    return out


def _product_of_factors(
    basis: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], ws: Workspace
) -> torch.Tensor:
    left, right = (factor.double() for factor in pair)
    inner = basis.t() @ left
    out = ws.empty(basis.shape[1], right.shape[1])

    def panel(rows: slice) -> None:
        out[rows] = inner[rows] @ right

    ws.map(panel, ws.panels(len(out)))
    return out


def _without_empty(
    vectors: torch.Tensor, coordinates: list[torch.Tensor], matrix: Matrix
) -> Aligned:
    """Without the directions of singular values below the cut. The length of the coordinates along
    a direction is its singular value, more exact than the root of an eigenvalue."""
    import torch

    parameters = matrix.tensor.parameters
    squares = vectors.new_zeros(vectors.shape[1])
    for z in coordinates:
        squares += torch.linalg.vector_norm(z, dim=1, dtype=torch.float64).square()
    if not bool(torch.isfinite(squares).all()):
        return _not_finite(matrix, len(vectors))
    sigma = squares.sqrt()
    cut = float(parameters["cut"])
    if parameters["cut_is"] == "relative" and len(sigma):
        cut *= float(sigma.max())
    keep = sigma > cut
    if bool(keep.all()):
        return Aligned(vectors, coordinates)
    for index, z in enumerate(coordinates):
        coordinates[index] = z[keep]
        del z
    return Aligned(vectors[:, keep], coordinates)


def _not_finite(matrix: Matrix, side: int) -> Aligned:
    along = matrix.rows + matrix.columns - side
    nothing = matrix.ws.empty(1, along).fill_(math.nan)
    basis = matrix.ws.empty(side, 1, dtype="float64").fill_(math.nan)
    return Aligned(basis, [nothing] * matrix.num_models)


def _merge(aligned: Aligned, matrix: Matrix) -> torch.Tensor:
    """The merged task vector, float32 [rows, columns]. Uses the coordinates up."""
    from pymerge.ops.matrix.products import product

    ws, out = matrix.ws, matrix.ws.empty(matrix.rows, matrix.columns)
    if not aligned.is_finite:
        return out.fill_(math.nan)
    if not aligned.num_elements:
        return out.zero_()
    merged = elementwise(aligned, matrix)
    aligned.coordinates.clear()
    turned = out.t() if _by_inputs(matrix.tensor) else out
    product(merged.t(), aligned.basis.t(), ws, out=turned)
    return out


def elementwise(aligned: Aligned, matrix: Matrix) -> torch.Tensor:
    """The merged coordinates, float32 [k, b]."""
    tensor, ws = matrix.tensor, matrix.ws
    first = aligned.coordinates[0]
    out = ws.empty(*first.shape)
    views, target = [view_of(z) for z in aligned.coordinates], view_of(out)
    # A number of its own for every coordinate of the tensor, however many directions each of its
    # matrices has.
    start = _number(matrix) * tensor.num_elements
    densities = tensor.each("density")
    factors = None
    if _how(tensor) == "dare_ties":
        keeps = [_chance(tensor, model, share) for model, share in enumerate(densities)]
        factors = [1 / share if share else 1.0 for share in densities]
    else:
        keeps = [Keep(found, start + first.numel()) for found in _keys(aligned, matrix)]
    combine = "count" if tensor.parameters["merge"] == "mean" else "sum"
    weights = tensor.each("weight")

    def piece(part: slice) -> None:
        num = part.stop - part.start
        tensor.ops.disjoint_merge(
            target.part(part.start, num),
            None,
            [view.part(part.start, num) for view in views],
            weights,
            keeps,
            start + part.start,
            elect="weighted",
            zero_sign=0,
            combine=combine,
            factors=factors,
        )

    ws.map(piece, ws.panels(first.numel(), PIECE))
    return out


def _chance(tensor: Tensor, model: int, share: float) -> Keep:
    if share >= 1:
        return Keep()
    seed = key(int(tensor.parameters["seed"]), "knots", tensor.name, tensor.model_numbers[model])
    return Keep(draws=int(share * ALL_DRAWS), seed=seed)


def _keys(aligned: Aligned, matrix: Matrix) -> list[int]:
    """The thresholds: what was found over the model, or those of the matrix alone."""
    tensor = matrix.tensor
    if _is_model_wide(tensor):
        found: list[int] = tensor.state
        return found
    counts = KeyCounts(tensor.num_models)
    _count(counts, aligned, matrix)
    counts.narrow([rank_of(share, aligned.num_elements) for share in tensor.each("density")])
    _count(counts, aligned, matrix)
    return counts.keys()
