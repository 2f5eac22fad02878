"""Each method against a float64 computation of its formula, written here from the papers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymerge
from pymerge.in_memory import tiles as in_memory
from pymerge.methods import trim
from pymerge.methods.ties import num_kept
from pymerge.ops.selection import Keep

DTYPES = ["float32", "bfloat16", "float16"]
# Half a unit in the last place of the output type, and float32's own rounding of the arithmetic.
HALF_ULP = {"float32": 2**-24, "bfloat16": 2**-9, "float16": 2**-12}


def models(
    num: int, shape: tuple[int, ...], dtype: str, *, scale: float = 1e-2
) -> list[torch.Tensor]:
    """A base and ``num`` fine-tuned models, as a checkpoint of ``dtype`` has them: full of ties."""
    generator = torch.Generator().manual_seed(num * 1000 + int(np.prod(shape)))
    base = torch.randn(shape, generator=generator) * 0.02
    tuned = [base + torch.randn(shape, generator=generator) * scale / 2**i for i in range(num)]
    return [tensor.to(getattr(torch, dtype)) for tensor in (base, *tuned)]


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy().ravel()


def assert_close(result: torch.Tensor, truth: np.ndarray, dtype: str, slack: float) -> None:
    """Within one rounding to the output and ``slack`` for the float32 arithmetic."""
    found = f64(result)
    smallest = {"float32": 2**-149, "bfloat16": 2**-133, "float16": 2**-24}[dtype]
    bound = np.abs(truth) * 2 * HALF_ULP[dtype] + smallest + slack
    worst = int(np.argmax(np.abs(found - truth) - bound))
    assert np.all(np.abs(found - truth) <= bound), (
        f"element {worst}: found {found[worst]}, true {truth[worst]}, bound {bound[worst]}"
    )


def true_trim(delta: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k largest magnitudes; a stable sort keeps equal ones in index order."""
    mask = np.zeros(delta.size, bool)
    mask[np.argsort(-np.abs(delta), kind="stable")[:k]] = True
    return mask


def true_ties(
    base: np.ndarray,
    tuned: list[np.ndarray],
    weights: list[float],
    masks: list[np.ndarray],
    normalize: bool,
    scale: float,
) -> np.ndarray:
    deltas = [
        np.where(m, np.float32(w) * (x - base), 0.0)
        for x, w, m in zip(tuned, weights, masks, strict=True)
    ]
    sign = np.where(np.sum(deltas, axis=0) >= 0, 1.0, -1.0)
    agree = [np.sign(d) == sign for d in deltas]
    merged = np.sum([d * a for d, a in zip(deltas, agree, strict=True)], axis=0)
    if normalize:
        divisor = np.sum([np.float32(w) * a for w, a in zip(weights, agree, strict=True)], axis=0)
        merged = merged / np.where(divisor == 0, 1.0, divisor)
    return base + scale * merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 2, 5, 20])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(dtype: str, num: int, normalize: bool) -> None:
    _, *tuned = models(num, (37, 53), dtype)
    weights = [0.5 + 0.1 * i for i in range(num)]
    result = pymerge.merge_tensor("linear", None, tuned, weight=weights, normalize=normalize)
    truth = sum(np.float64(np.float32(w)) * f64(x) for w, x in zip(weights, tuned, strict=True))
    if normalize:
        truth = truth / np.sum(np.float64(np.float32(weights)))
    assert_close(result, truth, dtype, slack=num * 2**-22 * 0.1 * max(1, sum(weights)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 3, 17])
@pytest.mark.parametrize(("normalize", "scale"), [(False, 1.0), (False, 0.3), (True, 1.7)])
def test_task_arithmetic(dtype: str, num: int, normalize: bool, scale: float) -> None:
    base, *tuned = models(num, (41, 29), dtype)
    weights = [(-1) ** i * (0.5 + 0.1 * i) for i in range(num)]
    result = pymerge.merge_tensor(
        "task_arithmetic", base, tuned, weight=weights, normalize=normalize, lambda_=scale
    )
    total = sum(
        np.float64(np.float32(w)) * (f64(x) - f64(base))
        for w, x in zip(weights, tuned, strict=True)
    )
    truth = f64(base) + scale * total / (sum(weights) if normalize else 1.0)
    assert_close(result, truth, dtype, slack=num * 2**-20 * 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(dtype: str, num: int, density: float, normalize: bool) -> None:
    base, *tuned = models(num, (61, 67), dtype)
    weights = [0.5 + 0.25 * i for i in range(num)]
    result = pymerge.merge_tensor(
        "ties", base, tuned, weight=weights, density=density, normalize=normalize, lambda_=0.75
    )
    size = base.numel()
    k = 0 if density == 0 else max(1, int(density * size))
    # The magnitudes that are ranked are float32 differences; in float64 ties would break apart.
    deltas = [(x.float() - base.float()).numpy().ravel() for x in tuned]
    masks = [true_trim(delta, k) for delta in deltas]
    truth = true_ties(f64(base), [f64(x) for x in tuned], weights, masks, normalize, 0.75)
    assert_close(result, truth, dtype, slack=num * 2**-20 * 0.1)


def test_ties_over_the_model_ranks_all_tensors_together(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    shapes = {"a.0.w": (50, 40), "a.1.w": (30, 70), "b": (333,), "empty": (0, 4)}
    base, tuned = {}, [{}, {}]
    for number, (name, shape) in enumerate(shapes.items()):
        b, x, y = models(2, shape, "bfloat16", scale=1e-3 * (1 + number))
        base[name], tuned[0][name], tuned[1][name] = b, x, y
    for folder, tensors in (("base", base), ("x", tuned[0]), ("y", tuned[1])):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    density = [0.3, 0.6]
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / n), "parameters": {"weight": 1.0, "density": d}}
            for n, d in zip("xy", density, strict=True)
        ],
        "parameters": {"trim_scope": "model"},
        "dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    order = list(pymerge.plan(recipe).donor.tensors)  # ties are kept in this order, then by index
    whole = [
        np.concatenate([(t[n].float() - base[n].float()).numpy().ravel() for n in order])
        for t in tuned
    ]
    masks = [true_trim(d, int(f * d.size)) for d, f in zip(whole, density, strict=True)]
    flat = np.concatenate([f64(base[n]) for n in order])
    truth = true_ties(
        flat, [np.concatenate([f64(t[n]) for n in order]) for t in tuned], [1, 1], masks, True, 1.0
    )
    found = np.concatenate([f64(result[n]) for n in order])
    np.testing.assert_allclose(found, truth, rtol=2**-22, atol=1e-8)
    for mask, delta in zip(
        masks, whole, strict=True
    ):  # the case is worth its name only with split ties
        threshold = np.abs(delta[mask]).min()
        assert np.any((np.abs(delta) == threshold) & ~mask)


def test_ties_over_the_model_refuses_a_density_that_varies(tmp_path) -> None:
    from safetensors.torch import save_file

    for folder in ("base", "x"):
        (tmp_path / folder).mkdir()
        save_file(
            {f"layers.{i}.w": torch.ones(4, 4) for i in range(2)},
            tmp_path / folder / "model.safetensors",
        )
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / "x"), "parameters": {"weight": 1, "density": [0.1, 0.9]}}
        ],
        "parameters": {"trim_scope": "model"},
    }
    with pytest.raises(pymerge.RecipeError, match="density must not vary"):
        pymerge.merge(recipe, tmp_path / "out")


def test_passthrough_copies_bits_and_scales() -> None:
    x = torch.tensor([1.0, float("nan"), -0.0, float("inf"), 1e-40])
    copied = pymerge.merge_tensor("passthrough", None, [x])
    assert copied.view(torch.int32).equal(x.view(torch.int32))
    scaled = pymerge.merge_tensor("passthrough", None, [torch.tensor([1.0, -3.0])], scale=0.5)
    assert scaled.tolist() == [0.5, -1.5]


def test_bad_values_never_disappear() -> None:
    base = torch.zeros(64)
    bad = torch.full((64,), 1e-3)
    bad[5], bad[6] = float("nan"), float("inf")
    good = torch.full((64,), -5.0)
    result = pymerge.merge_tensor("ties", base, [bad, good], weight=1.0, density=0.1)
    assert torch.isnan(result[5])
    assert torch.isinf(result[6])


def select(deltas: list[np.ndarray], keep: list[int], **patches: int) -> list[Keep]:
    """The trims of in-memory deltas, in tiles of a few elements."""
    arrays = [np.ascontiguousarray(d, dtype=np.float32) for d in deltas]
    base = np.zeros_like(arrays[0])
    from pymerge.methods.protocol import Tensor, answer
    from pymerge.ops.opset import choose_ops
    from pymerge.ops.view import view

    tensor = Tensor(
        "t", base.shape, len(arrays), True, {}, [{} for _ in arrays], choose_ops(trim.TRIM_OPS)
    )
    tiles = in_memory.cut(view(base), [view(a) for a in arrays], in_memory.TILE_ELEMENTS)

    def measure(question):
        chosen = tiles if question.only is None else [tiles[question.only]]
        results = [question.run(tile) for tile in chosen]
        if question.fold is None:
            return results
        return list(itertools.accumulate(results, question.fold))[-1]

    return answer(trim.trim_tensor(tensor, keep), measure)


def kept(delta: np.ndarray, chosen: Keep) -> np.ndarray:
    keys = np.abs(delta.astype(np.float32)).view(np.int32)
    index = np.arange(delta.size)
    return (keys > chosen.threshold) | ((keys == chosen.threshold) & (index < chosen.cutoff))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 400),
    distinct=st.integers(1, 40),
    tile=st.integers(1, 90),
    collect=st.sampled_from([0, 50, 1 << 18]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_selection_equals_a_stable_sort(size, distinct, tile, collect, share, seed) -> None:
    """Whichever way is taken - collect all, bracket by sample, histogram - the mask is the same."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(distinct).astype(np.float32)
    deltas = [random.choice(values, size) * random.choice([-1, 1], size) for _ in range(2)]
    keep = [int(share * size), size - int(share * size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "TILE_ELEMENTS", tile)
        patch.setattr(trim, "COLLECT_LIMIT", collect)
        patch.setattr(trim, "SAMPLE_SIZE", 64)
        patch.setattr(trim, "BRACKET_SIGMAS", 0.5)  # often misses: then the histogram must answer
        trims = select(deltas, keep)
    for delta, k, chosen in zip(deltas, keep, trims, strict=True):
        np.testing.assert_array_equal(kept(delta, chosen), true_trim(delta.astype(np.float32), k))


def test_selection_of_a_large_tensor_takes_the_bracket(monkeypatch) -> None:
    """On a million normal values the sample holds, so the histogram is never needed."""
    random = np.random.default_rng(1)
    deltas = [random.standard_normal(1 << 20).astype(np.float32) for _ in range(2)]
    monkeypatch.setattr(trim, "_rank_by_histogram", None)
    trims = select(deltas, [200_000, 7])
    for delta, k, chosen in zip(deltas, [200_000, 7], trims, strict=True):
        np.testing.assert_array_equal(kept(delta, chosen), true_trim(delta, k))


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [
        (0.0, 10, 0),
        (1e-12, 10, 1),
        (0.29, 100, int(0.29 * 100)),
        (1.0, 7, 7),
        (0.5, 0, 0),
        (0.5, 1, 1),
    ],
)
def test_num_kept(density: float, size: int, count: int) -> None:
    assert num_kept(density, size) == count
