"""The interpolating methods against float64 computations of their formulas on the vectors
themselves, as their authors and mergekit describe them, iteration and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pymerge

DTYPES = ["float32", "bfloat16", "float16"]
HALF_ULP = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
SHAPES = [(37, 53), (5000,), (3, 11, 19)]

Array = np.ndarray[Any, Any]


def models(num: int, shape: tuple[int, ...], dtype: str, *, spread: float = 1e-2) -> list[Any]:
    """A base and ``num`` models around it, of no common norm."""
    generator = torch.Generator().manual_seed(num * 100 + len(shape))
    base = torch.randn(shape, generator=generator) * 0.02
    common = torch.randn(shape, generator=generator) * spread
    tuned = [
        base + common + torch.randn(shape, generator=generator) * spread * (1 + i)
        for i in range(num)
    ]
    return [tensor.to(getattr(torch, dtype)) for tensor in (base, *tuned)]


def merge(method: str, base: Any, tuned: list[Any], **parameters: Any) -> torch.Tensor:
    result = pymerge.merge_tensor(method, base, tuned, backend="reference", **parameters)
    assert isinstance(result, torch.Tensor)
    return result


def f64(tensor: torch.Tensor) -> Array:
    return tensor.to(torch.float64).numpy()


def deltas(base: torch.Tensor, tuned: list[torch.Tensor]) -> list[Array]:
    """The float32 differences, which is what a task vector is."""
    return [(x.float() - base.float()).double().numpy() for x in tuned]


def assert_close(result: torch.Tensor, truth: Array, terms: list[Array], dtype: str) -> None:
    """Within one rounding to the output, and for each term of the sum two of float32: that of its
    factor and of its product; and those of the additions."""
    sizes = np.sum([np.abs(term) for term in terms], axis=0)
    bound = np.abs(truth) * HALF_ULP[dtype] + (2 + len(terms)) * 2**-24 * sizes + 2.0**-24 * 1e-8
    if dtype == "float16":
        bound = bound + 2.0**-25
    error = np.abs(f64(result) - truth)
    worst = np.unravel_index(int(np.argmax(error - bound)), error.shape)
    assert np.all(error <= bound), f"{worst}: {error[worst]} off, bound {bound[worst]}"


def along(x: Array, axis: int | None) -> Array:
    """The norm of x over all elements or along an axis, kept as an extent."""
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=True))


def true_slerp(x: Array, y: Array, t: float, axis: int | None, linear: Callable[[Any], Any]) -> Any:
    """The factors on two vectors, from their directions."""
    cosine = np.clip(
        np.sum((x / along(x, axis)) * (y / along(y, axis)), axis=axis, keepdims=True), -1, 1
    )
    angle = np.arccos(cosine)
    with np.errstate(all="ignore"):
        first, second = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    straight = linear(cosine)
    return np.where(straight, 1 - t, first), np.where(straight, t, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5, -0.25])
def test_slerp(dtype: str, shape: tuple[int, ...], t: float) -> None:
    base, other = models(1, shape, dtype)
    x, y = f64(base), f64(other)
    a, b = true_slerp(x, y, t, None, lambda c: np.abs(c) > 0.9995)
    assert_close(merge("slerp", base, [other], t=t), a * x + b * y, [a * x, b * y], dtype)


def test_slerp_of_nearly_parallel_tensors_is_linear() -> None:
    base, other = models(1, (64, 64), "float32", spread=1e-5)
    result = merge("slerp", base, [other], t=0.4)
    x, y = f64(base), f64(other)
    assert_close(result, 0.6 * x + 0.4 * y, [0.6 * x, 0.4 * y], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("mode", ["tensor", "rows", "columns"])
def test_nuslerp(dtype: str, shape: tuple[int, ...], with_base: bool, mode: str) -> None:
    base, *tuned = models(2, shape, dtype)
    weights = [0.4, 1.1]
    flags = {
        "tensor": {},
        "rows": {"nuslerp_flatten": False},
        "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }[mode]
    result = merge("nuslerp", base if with_base else None, tuned, weight=weights, **flags)
    x, y = deltas(base, tuned) if with_base else [f64(each) for each in tuned]
    axis = None if mode == "tensor" else -1 if mode == "rows" else 0
    t = weights[1] / sum(weights)
    a, b = true_slerp(x, y, t, axis, lambda c: 1 - c * c <= 1e-12)
    start = f64(base) if with_base else 0.0
    terms = [a * x, b * y, *([start] if with_base else [])]
    assert_close(result, start + a * x + b * y, terms, dtype)


def test_nuslerp_resolves_an_angle_that_float32_takes_for_zero() -> None:
    """At t = 3 the factors differ from the linear ones by 4φ² and more; φ is 1e-2 here, while the
    task vectors are so small that float32 squares of them vanish."""
    x = torch.zeros(1000)
    y = torch.zeros(1000)
    x[:500], y[:500] = 1e-21, 1e-21
    y[500:] = 1e-23
    z = np.float64(np.float32(1e-21)), np.float64(np.float32(1e-23))
    angle = np.arctan2(z[1], z[0])
    result = merge("nuslerp", None, [x * 1e15, y * 1e15], weight=[-2.0, 3.0]).double() / 1e15
    second = np.sin(3 * angle) / np.sin(angle)
    first = np.sin(-2 * angle) / np.sin(angle)
    assert result[0] == pytest.approx((first + second) * 1e-21, rel=1e-5)
    assert result[999] == pytest.approx(second * 1e-23, rel=1e-6)


def true_multislerp(vectors: list[Array], weights: list[float], eps: float) -> Array:
    """By way of the tangent space at the mean direction, as published."""
    norms = [float(along(x, None).item()) for x in vectors]
    units = [x / (n + eps) for x, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / along(mean, None)
    tangents = [u - np.sum(u * mean) * mean for u in units]
    tangent = sum(w * v for w, v in zip(weights, tangents, strict=True))
    length = float(along(tangent, None).item()) + eps
    result = mean * np.cos(length) + tangent * (np.sin(length) / length)
    return np.asarray(result * sum(w * n for w, n in zip(weights, norms, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [2, 3, 7])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(dtype: str, num: int, with_base: bool, normalize: bool) -> None:
    base, *tuned = models(num, (37, 53), dtype)
    weights = [0.3 + 0.2 * i for i in range(num)]
    result = merge(
        "multislerp",
        base if with_base else None,
        tuned,
        weight=weights,
        normalize_weights=normalize,
    )
    vectors = deltas(base, tuned) if with_base else [f64(x) for x in tuned]
    used = [w / sum(weights) for w in weights] if normalize else weights
    start = f64(base) if with_base else np.zeros(base.shape)
    truth = start + true_multislerp(vectors, used, 1e-8)
    terms = [2 * w * x for w, x in zip(used, vectors, strict=True)]
    assert_close(result, truth, [start, *terms], dtype)


def true_karcher(tensors: list[Array], max_iter: int, tol: float) -> Array:
    """The iteration on the vectors themselves."""
    norms = [float(along(x, None).item()) for x in tensors]
    units = [x / n for x, n in zip(tensors, norms, strict=True) if n > tol]
    mean = sum(units) / len(units)
    length = along(mean, None).item()
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            dot = np.clip(np.sum(mean * unit), -1, 1)
            angle = np.arccos(dot)
            if angle >= tol:
                tangent += angle / np.sin(angle) * (unit - dot * mean) / len(units)
        step = along(tangent, None).item()
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
        mean = mean / along(mean, None)
    return np.asarray(np.mean(norms) * mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("spread", [1e-4, 2e-2, 1.0])
def test_karcher(dtype: str, num: int, spread: float) -> None:
    base, *tuned = models(num - 1, (37, 53), dtype, spread=spread)
    inputs = [base, *tuned]
    result = merge("karcher", None, inputs)
    vectors = [f64(x) for x in inputs]
    truth = true_karcher(vectors, 10, 1e-5)
    terms = [2 * np.abs(truth), *(x / num for x in vectors)]
    assert_close(result, truth, terms, dtype)


@pytest.mark.parametrize("max_iter", [0, 1, 40])
def test_karcher_stops_when_it_is_told(max_iter: int) -> None:
    vectors = [f64(x) for x in models(2, (11, 13), "float32", spread=1.0)]
    tensors = [torch.from_numpy(x).float() for x in vectors]
    result = merge("karcher", None, tensors, max_iter=max_iter, tol=1e-9)
    truth = true_karcher(vectors, max_iter, 1e-9)
    assert_close(result, truth, [2 * truth, *vectors], "float32")
    further = true_karcher(vectors, max_iter + 1, 1e-9)
    assert (np.abs(further - truth).max() > 1e-3) == (max_iter < 2)  # the steps are worth testing


def test_karcher_is_the_stationary_point() -> None:
    """The geodesics from the mean to the directions balance: what defines it, however found."""
    vectors = [f64(x) for x in models(3, (9, 17), "float32", spread=1.0)]
    result = merge(
        "karcher", None, [torch.from_numpy(x).float() for x in vectors], max_iter=200, tol=1e-12
    )
    mean = f64(result) / along(f64(result), None)
    pull = np.zeros_like(mean)
    for vector in vectors:
        unit = vector / along(vector, None)
        angle = np.arccos(np.sum(unit * mean))
        pull += angle / np.sin(angle) * (unit - np.cos(angle) * mean)
    assert along(pull, None).item() < 1e-6


def true_ratio(vectors: list[Array], average: str, axis: int | None) -> Array:
    num = len(vectors)
    pairs = [(i, j) for i in range(num) for j in range(i + 1, num)]
    found = []
    for i, j in pairs:
        dot = np.sum(vectors[i] * vectors[j], axis=axis, keepdims=True)
        size = along(vectors[i], axis) * along(vectors[j], axis)
        found.append(dot / np.maximum(size, 1e-6) if average == "cosine" else dot / (size + 1e-8))
    clipped = np.clip(found, -1, 1)
    mean = np.mean(clipped, 0) if average == "cosine" else np.cos(np.mean(np.arccos(clipped), 0))
    guard = 0.0 if average == "cosine" else 1e-8
    return np.asarray(num * mean / (1 + (num - 1) * mean + guard))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize("preset", ["mergekit", "official"])
def test_model_stock(
    dtype: str, num: int, shape: tuple[int, ...], filter_wise: bool, preset: str
) -> None:
    base, *tuned = models(num, shape, dtype)
    result = merge("model_stock", base, tuned, filter_wise=filter_wise, preset=preset)
    vectors = deltas(base, tuned)
    average = "angle" if preset == "official" else "cosine"
    t = true_ratio(vectors, average, -1 if filter_wise else None)
    x = f64(base)
    terms = [t / num * v for v in vectors]
    assert_close(result, x + sum(terms), [x, *terms], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.0, 1e-3, 5e-2, -1.0])
def test_nearswap(dtype: str, t: float) -> None:
    base, other = models(1, (37, 53), dtype)
    other[0, :7] = base[0, :7]
    x, y = f64(base), f64(other)
    w = np.clip(t / np.maximum(np.abs(y - x), 1e-6), 0, 1)
    terms = [2 * w * y, 2 * (1 - w) * x]
    assert_close(merge("nearswap", base, [other], t=t), w * y + (1 - w) * x, terms, dtype)


def test_presets_and_averages_differ() -> None:
    """The two averages are two methods for more than two models, and one for two."""
    base, *tuned = models(3, (20, 30), "float32")
    by = {p: merge("model_stock", base, tuned, preset=p) for p in ("mergekit", "official")}
    assert np.abs(f64(by["mergekit"] - by["official"])).max() > 1e-6
    explicit = merge("model_stock", base, tuned, preset="official", average="cosine")
    assert explicit.equal(by["mergekit"])
    two = [merge("model_stock", base, tuned[:2], preset=p) for p in ("mergekit", "official")]
    np.testing.assert_allclose(f64(two[0]), f64(two[1]), atol=1e-8)


def test_model_stock_skips_to_the_mean() -> None:
    base, *tuned = models(3, (20, 30), "float32")
    result = merge("model_stock", base, tuned, skip=True, filter_wise=True)
    truth = np.mean([f64(x) for x in tuned], axis=0)
    assert_close(result, truth, [f64(x) / 3 for x in tuned], "float32")


def true_fusion(base: Array, other: Array) -> tuple[Array, Array, float]:
    """The divergences, scores and the threshold in float64."""
    rows = [x.reshape(1, -1) if x.ndim < 2 else x for x in (base, other)]

    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True) + 1e-8)

    p, q = softmax(rows[1]), softmax(rows[0])
    divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    scores = (np.abs(rows[1] - rows[0]) * divergence).reshape(base.shape)
    ordered = np.sort(scores.ravel())
    first, median, third = (ordered[(scores.size - 1) * k // 4] for k in (1, 2, 3))
    return divergence, scores, median + 1.5 * (third - first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 53), (700,), (4, 9, 21)])
def test_arcee_fusion(dtype: str, shape: tuple[int, ...]) -> None:
    """Every element is the model's or the base's; which one may differ from float64 only where the
    score is as near to the threshold as float32 divergences (open by about 1e-7) allow."""
    base, other = models(1, shape, dtype, spread=0.3)
    result = merge("arcee_fusion", base, [other])
    x, y = f64(base), f64(other)
    divergence, scores, threshold = true_fusion(x, y)
    chosen = scores >= threshold
    doubt = np.abs(scores - threshold) <= 3e-7 / divergence.min() * scores + 3e-7
    found = f64(result)
    assert np.all((found == x) | (found == y))
    assert np.array_equal(found[~doubt], np.where(chosen, y, x)[~doubt])
    assert np.mean(doubt) < 0.02
    assert 0.01 < np.mean(chosen) < 0.4
