"""Where angles, norms or weights leave an interpolation undefined, and what must not matter."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.in_memory import tiles as in_memory
from pymerge.methods import arcee_fusion, gram
from pymerge.methods.angles import arccosine, cosine, sine
from pymerge.methods.order import order_statistics
from pymerge.methods.protocol import Measure, Tile, answer
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import view

#: Every method in every mode, with models beside the base, whether the base is given, parameters.
CALLS: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "slerp": ("slerp", 1, True, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, False, {"weight": [1.0, 2.0]}),
    "nuslerp-base": ("nuslerp", 2, True, {"weight": [1.0, 2.0]}),
    "nuslerp-rows": ("nuslerp", 2, True, {"weight": 1.0, "nuslerp_flatten": False}),
    "nuslerp-columns": (
        "nuslerp",
        2,
        False,
        {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ("multislerp", 3, False, {"weight": [0.2, 0.5, 0.3]}),
    "multislerp-base": ("multislerp", 3, True, {"weight": 1.0}),
    "karcher": ("karcher", 3, False, {}),
    "model_stock": ("model_stock", 3, True, {}),
    "model_stock-rows": ("model_stock", 3, True, {"filter_wise": True, "preset": "official"}),
    "nearswap": ("nearswap", 1, True, {"t": 1e-2}),
    "arcee_fusion": ("arcee_fusion", 1, True, {}),
}


def call(name: str, base: Any, tuned: list[Any], **more: Any) -> Any:
    method, num, has_base, parameters = CALLS[name]
    return pymerge.merge_tensor(
        method,
        base if has_base else None,
        tuned[:num],
        **{"backend": "reference", **parameters, **more},
    )


def tensors(num: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.05 for _ in range(num)]


def test_trigonometry_is_as_good_as_the_library() -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(-30, 30, 5000), [0.0, math.pi, -math.pi / 2, 1e-300]])
    assert np.abs(sine(x) - [math.sin(v) for v in x]).max() < 1e-15
    assert np.abs(cosine(x[:5000] / 10) - [math.cos(v / 10) for v in x[:5000]]).max() < 1e-15
    c = np.concatenate([random.uniform(-1, 1, 5000), 1 - 2.0 ** -np.arange(1, 54), [1, -1, 0.5, 0]])
    expected = np.array([math.acos(v) for v in c])
    assert (np.abs(arccosine(c) - expected) <= 1e-15 * expected).all()
    assert np.isnan(arccosine(math.nan))
    assert np.isnan(sine(math.inf))


def test_gram_knows_a_small_angle() -> None:
    """Of vectors 1e-4 apart the float32 inner product says that they are parallel."""
    x = np.random.default_rng(3).standard_normal(100_000)
    y = np.random.default_rng(4).standard_normal(100_000)
    y -= x * (x @ y) / (x @ x)
    other = (x * math.cos(1e-4) + y * math.sin(1e-4)).astype(np.float32)
    first = x.astype(np.float32)
    ops = choose_ops(("gram_n",), asked="reference")
    sums = ops.gram_n(None, (view(first), view(other)), span=4096)
    matrix = gram.square([gram.exact_sum(column) for column in sums.T])
    found = float(arccosine(matrix[0, 1] / math.sqrt(matrix[0, 0] * matrix[1, 1])))
    assert found == pytest.approx(1e-4, rel=2e-3)
    unit = [v / np.linalg.norm(v) for v in (first, other)]
    assert np.arccos(np.clip(np.float32(unit[0] @ unit[1]), -1, 1)) != pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (), (1,), (1, 1), (2, 1, 1)])
def test_shapes_without_much_in_them(name: str, shape: tuple[int, ...]) -> None:
    base, *tuned = tensors(4, shape)
    result = call(name, base, tuned)
    assert result.shape == shape
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", CALLS)
def test_equal_inputs_are_the_output(name: str) -> None:
    base, x = tensors(2, (40, 33))
    result = call(name, x if name in ("slerp", "nearswap", "arcee_fusion") else base, [x] * 3)
    np.testing.assert_allclose(result, x, rtol=0, atol=2**-22 * 0.3)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_never_disappear(name: str, bad: float) -> None:
    base, *tuned = tensors(4, (20, 30))
    tuned[0][3, 5] = bad
    result = call(name, base, tuned)
    assert not torch.isfinite(result[3, 5])


@pytest.mark.parametrize("name", CALLS)
def test_zero_tensors_stay_finite(name: str) -> None:
    zero = torch.zeros(20, 30)
    base, x = tensors(2, (20, 30))
    assert call(name, zero, [zero] * 3).equal(zero)
    if CALLS[name][2] and name != "slerp":
        assert call(name, base, [base] * 3).equal(base)  # a tensor that no model changed
    assert call(name, zero, [x, zero, x]).isfinite().all()
    assert call(name, zero, [zero, x, zero]).isfinite().all()


def test_slerp_of_a_zero_tensor_takes_a_right_angle() -> None:
    (x,) = tensors(1, (20, 30))
    result = call("slerp", torch.zeros_like(x), [x], t=0.3)
    np.testing.assert_allclose(result, math.sin(0.3 * math.pi / 2) * x, rtol=3e-7)


@pytest.mark.parametrize("name", ["nuslerp", "nuslerp-rows", "nuslerp-columns", "multislerp"])
def test_opposite_tensors_are_interpolated_linearly(name: str) -> None:
    (x,) = tensors(1, (20, 30))
    method, _, _, parameters = CALLS[name]
    result = pymerge.merge_tensor(
        method, None, [x, -3 * x], backend="reference", **{**parameters, "weight": [3.0, 1.0]}
    )
    shares = [0.75, 0.25]
    if name == "multislerp":  # the directions need not balance: then the mean is the heavier's
        result = pymerge.merge_tensor(
            method, None, [x, -3 * x], backend="reference", weight=[0.5, 0.5]
        )
        shares = [0.5, 0.5]
    np.testing.assert_allclose(result, shares[0] * x - 3 * shares[1] * x, atol=1e-8)


def test_nearly_opposite_tensors_do_not_blow_up() -> None:
    """Rounded to float32, opposite vectors are about 1e-8 from opposite; any plane through them
    would be a plane of rounding errors."""
    (x,) = tensors(1, (300, 301))
    other = -(x * 1.1)
    for name in ("nuslerp", "multislerp"):
        result = pymerge.merge_tensor(name, None, [x, other], weight=1.0, backend="reference")
        np.testing.assert_allclose(result, 0.5 * (x + other), atol=1e-7)


def test_multislerp_of_balanced_directions_has_none() -> None:
    (x,) = tensors(1, (20, 30))
    with pytest.raises(pymerge.RecipeError, match="no direction"):
        call("multislerp", None, [x, -x, x], weight=[0.25, 0.5, 0.25])


def test_multislerp_of_weights_that_cancel() -> None:
    base, x, y = tensors(3, (20, 30))
    with pytest.raises(pymerge.RecipeError, match="sum to zero"):
        pymerge.merge_tensor("multislerp", base, [x, y], weight=[1.0, -1.0], backend="reference")
    kept = pymerge.merge_tensor(
        "multislerp", None, [x, y], weight=[1.0, -1.0], normalize_weights=False, backend="reference"
    )
    assert torch.isfinite(kept).all()


def test_nuslerp_of_weights_that_cancel_goes_half_way() -> None:
    x, y = tensors(2, (20, 30))
    halves = call("nuslerp", None, [x, y], weight=[0.5, 0.5])
    assert call("nuslerp", None, [x, y], weight=[1.0, -1.0]).equal(halves)
    assert call("nuslerp", None, [x, y], weight=[3e-7, 2e-7]).equal(halves)


def test_karcher_of_opposite_tensors_is_the_first() -> None:
    (x,) = tensors(1, (20, 30))
    for tol in (1e-5, 0.0):
        result = pymerge.merge_tensor("karcher", None, [x, -3 * x], tol=tol, backend="reference")
        np.testing.assert_allclose(result, 2 * x, rtol=3e-7)


def test_karcher_counts_zero_tensors_in_the_norm_only() -> None:
    x, zero = tensors(1, (20, 30))[0], torch.zeros(20, 30)
    result = pymerge.merge_tensor("karcher", None, [x, zero, 2 * x], backend="reference")
    np.testing.assert_allclose(result, x, rtol=3e-7)


@pytest.mark.parametrize("name", ["multislerp", "multislerp-base", "karcher"])
def test_one_model_is_returned(name: str) -> None:
    base, x = tensors(2, (20, 30))
    method, _, has_base, _ = CALLS[name]
    weight = {} if name == "karcher" else {"weight": 0.3}
    result = pymerge.merge_tensor(
        method, base if has_base else None, [x], backend="reference", **weight
    )
    assert result.equal(x)


def test_model_stock_of_opposite_task_vectors_keeps_the_base() -> None:
    """For two models 1 + cos is zero there; for three, opposite pairs pull far away unless held."""
    x, y = tensors(2, (20, 30))
    zero = torch.zeros_like(x)
    for preset in ("mergekit", "official"):
        assert call("model_stock", zero, [x, -2 * x], preset=preset).equal(zero)
    free = call("model_stock", zero, [x, -x, y], clamp=False)
    held = call("model_stock", zero, [x, -x, y], clamp=True)
    assert free.abs().max() > 0
    assert held.equal(zero)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(97, 131), (12707,), (9, 23, 61)])
def test_neither_tiles_nor_threads_matter(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = tensors(4, shape)
    whole = call(name, base, tuned, threads=1)
    monkeypatch.setattr(in_memory, "TILE_ELEMENTS", 4096)
    monkeypatch.setattr(arcee_fusion, "PIECE_ELEMENTS", 300)
    assert call(name, base, tuned, threads=2).equal(whole)


@pytest.mark.parametrize("name", ["nuslerp-rows", "model_stock-rows"])
def test_short_rows_take_no_memory_to_speak_of(name: str) -> None:
    """A matrix of one column has as many rows as elements, each with products and factors."""
    base, *tuned = (tensor.numpy() for tensor in tensors(4, (1 << 18, 1)))
    call(name, base[:8], [x[:8] for x in tuned], backend="cpu")
    tracemalloc.start()
    try:
        call(name, base, tuned, threads=1, backend="cpu")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < base.nbytes + (4 << 20)


def test_looks_that_fold_are_not_collected() -> None:
    """Each tile gives a table of 512 KiB, of which those in progress and the sum are there."""
    values = np.random.default_rng(2).standard_normal(100_000).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "TILE_ELEMENTS", 1000)
        tracemalloc.start()
        try:
            pymerge.merge_tensor(
                "ties",
                np.zeros_like(values),
                [values],
                preset="official",
                threads=2,
                backend="cpu",
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 16 << 20


def test_a_vector_is_one_row() -> None:
    base, *tuned = tensors(4, (500,))
    rows = call("nuslerp", None, tuned, nuslerp_flatten=False)
    columns = call("nuslerp", None, tuned, nuslerp_flatten=False, nuslerp_row_wise=True)
    assert rows.equal(columns)
    assert rows.equal(call("nuslerp", None, tuned))
    rows = call("model_stock", base, tuned, filter_wise=True)
    assert rows.equal(call("model_stock", base, tuned))


def test_columns_are_rows_of_the_transpose() -> None:
    base, *tuned = tensors(3, (31, 47))
    columns = call("nuslerp-base", base, tuned, nuslerp_flatten=False, nuslerp_row_wise=True)
    turned = [t.T.contiguous() for t in (base, *tuned)]
    rows = call("nuslerp-base", turned[0], turned[1:], nuslerp_flatten=False)
    np.testing.assert_allclose(columns, rows.T, rtol=0, atol=2**-24 * 0.5)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    distinct=st.integers(1, 30),
    tile=st.integers(1, 80),
    share_nan=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_statistics_equal_a_sort(size, distinct, tile, share_nan, seed) -> None:
    random = np.random.default_rng(seed)
    values = random.choice(np.float32([0, 1e-40, *random.standard_normal(distinct)]), size)
    values = (values * random.choice([-1, 1, 1], size)).astype(np.float32)
    values[random.random(size) < share_nan] = np.nan
    ops = choose_ops(("magnitude_histogram",), asked="reference")
    holders = []

    def scores(piece: Tile):
        part = values[piece.start : piece.start + piece.num]
        parts = [part]
        if np.any(part < 0):
            parts = [np.where(part < 0, np.nan, part), np.where(part < 0, -part, np.nan)]
        arrays = [np.ascontiguousarray(p, np.float32) for p in parts]
        holders.append(arrays)
        yield tuple(view(array) for array in arrays)

    whole = view(values)
    tiles = [t for _, t in Tile(0, size, None, (whole,)).pieces(tile)]

    def measure(question: Measure):
        results = [question.run(each) for each in tiles]
        total = results[0]
        for result in results[1:]:
            total = question.fold(total, result)
        return total

    ranks = sorted({0, size // 4, size // 2, size - 1})
    found = answer(order_statistics(ops, scores, ranks), measure)
    np.testing.assert_array_equal(found, np.sort(values)[ranks])


def test_arcee_fusion_ranks_negative_scores_below_zero() -> None:
    """Rounding makes the divergence of rows that hardly moved negative; such rows must not count as
    if they had moved that much."""
    base, tiny = tensors(2, (64, 256))
    other = base + tiny * 1e-4
    seen: list[np.ndarray] = []
    ops = choose_ops(("row_divergence",), asked="reference")
    divergence = ops.row_divergence(view(base), view(other), columns=256)
    assert (divergence < 0).any()  # else the case is not worth its name
    seen.append(divergence)
    scores = np.abs(other.numpy() - base.numpy()) * divergence[:, None]
    ordered = np.sort(scores.ravel())
    first, median, third = (ordered[(scores.size - 1) * k // 4] for k in (1, 2, 3))
    threshold = median + np.float32(1.5) * (third - first)
    truth = np.where(scores < threshold, base.numpy(), other.numpy())
    np.testing.assert_array_equal(call("arcee_fusion", base, [other]), truth)


def write(folder: Path, number: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    made = dict(zip(shapes, tensors(len(shapes), (1,)), strict=True))
    for index, (name, shape) in enumerate(shapes.items()):
        made[name] = tensors(1, shape, seed=number * 100 + index)[0]
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    return made


SHAPES = {f"layers.{i}.w": (33, 40 + i) for i in range(3)} | {"norm": (40,), "embed": (70, 20)}
RECIPES = {
    "slerp": ({"t": [0.0, 0.5, 1.0]}, True, True),
    "nuslerp": ({"weight": 0.7}, False, False),
    "nuslerp-rows": ({"weight": 0.7, "nuslerp_flatten": False}, True, True),
    "multislerp": ({"weight": 0.7}, True, False),
    "karcher": ({"max_iter": 3}, True, False),
    "model_stock": ({"filter_wise": {"filter": "layers.1", "value": True}}, True, True),
    "nearswap": ({"t": 0.02}, True, True),
    "arcee_fusion": ({}, True, False),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_the_tensors_one_by_one(case: str, tmp_path: Path) -> None:
    """With the base among the models (as mergekit's slerp recipes have it) or beside them."""
    method = case.split("-")[0]
    parameters, with_base, listed = RECIPES[case]
    num = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1}.get(method, 2)
    loaded = [write(tmp_path / f"m{n}", n, SHAPES) for n in range(num + 1)]
    names = [str(tmp_path / f"m{n}") for n in range(num + 1)]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} for name in (names if listed else names[1:])],
        "parameters": parameters,
        "dtype": "float32",
    }
    if with_base:
        recipe["base_model"] = names[0]
    pymerge.merge(recipe, tmp_path / "out", backend="reference")
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        base, *tuned = [each[name] for each in loaded]
        used = dict(parameters)
        if case == "slerp":
            layer = name.startswith("layers") and int(name.split(".")[1])
            used = {"t": layer / 2 if layer else 0.0}
        if method == "model_stock":
            used = {"filter_wise": "layers.1" in name}
        # karcher's base_model is one more model, after the others where it is not listed
        if method == "karcher":
            tuned = [*tuned, base]
        truth = pymerge.merge_tensor(
            method,
            base if with_base and method != "karcher" else None,
            tuned,
            backend="reference",
            **used,
        )
        assert result[name].equal(truth), name


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("slerp", 2, True, "exactly 1 model besides the base, found 2"),
        ("slerp", 2, False, "needs a base_model"),
        ("nuslerp", 3, False, "exactly 2 models, found 3"),
        ("nuslerp", 1, True, "exactly 2 models besides the base, found 1"),
        ("model_stock", 1, True, "2 or more models besides the base, found 1"),
        ("nearswap", 2, True, "exactly 1 model besides the base, found 2"),
        ("arcee_fusion", 1, False, "needs a base_model"),
    ],
)
def test_a_recipe_of_too_many_or_too_few(
    method: str, models: int, base: bool, message: str
) -> None:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"m{n}"} for n in range(models)],
        "parameters": {"t": 0.5} if method in ("slerp", "nearswap") else {},
    }
    if base:
        recipe["base_model"] = "b"
    with pytest.raises(pymerge.RecipeError, match=message):
        pymerge.plan(recipe)


def test_t_is_required(tmp_path: Path) -> None:
    for n in range(2):
        write(tmp_path / f"m{n}", n, SHAPES)
    for method in ("slerp", "nearswap"):
        recipe = {
            "merge_method": method,
            "base_model": str(tmp_path / "m0"),
            "models": [{"model": str(tmp_path / "m1")}],
        }
        with pytest.raises(pymerge.RecipeError, match="needs the parameter 't'"):
            pymerge.plan(recipe, backend="reference")
