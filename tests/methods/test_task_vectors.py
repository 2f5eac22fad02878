"""RAM, MagMax, consensus task arithmetic and PCB-Merging against float64 transcriptions of their
formulas, on the float32 differences that a task vector is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymerge
from pymerge.errors import PymergeError, RecipeError
from pymerge.in_memory import tiles as in_memory
from pymerge.methods import get_method

DTYPES = ["float32", "bfloat16", "float16"]
HALF_ULP = {"float32": 2**-24, "bfloat16": 2**-9, "float16": 2**-12}
METHODS = ["ram", "ramplus_tl", "magmax", "consensus_ta", "pcb"]

Array = np.ndarray[Any, Any]


def models(num: int, shape: tuple[int, ...], dtype: str) -> list[torch.Tensor]:
    """A base and ``num`` fine-tuned models; a third of the elements of each are unchanged."""
    generator = torch.Generator().manual_seed(num * 1000 + len(shape))
    base = torch.randn(shape, generator=generator) * 0.02
    tuned = []
    for i in range(num):
        change = torch.randn(shape, generator=generator) * 1e-2 / 2**i
        change[torch.rand(shape, generator=generator) < 1 / 3] = 0
        tuned.append(base + change)
    return [tensor.to(getattr(torch, dtype)) for tensor in (base, *tuned)]


def merge(method: str, base: Any, tuned: list[Any], **parameters: Any) -> torch.Tensor:
    result = pymerge.merge_tensor(method, base, tuned, backend="reference", **parameters)
    assert isinstance(result, torch.Tensor)
    return result


def f64(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy().ravel()


def deltas(base: torch.Tensor, tuned: list[torch.Tensor]) -> Array:
    """Task vectors [models, elements]."""
    return np.stack([(x.float() - base.float()).double().numpy().ravel() for x in tuned])


def assert_close(result: torch.Tensor, truth: Array, dtype: str, slack: Array | float) -> None:
    found = f64(result)
    smallest = {"float32": 2**-149, "bfloat16": 2**-133, "float16": 2**-24}[dtype]
    bound = np.abs(truth) * 2 * HALF_ULP[dtype] + smallest + slack
    worst = int(np.argmax(np.abs(found - truth) - bound))
    assert np.all(np.abs(found - truth) <= bound), (
        f"element {worst}: found {found[worst]}, true {truth[worst]}, bound {bound}"
    )


def true_ram(base: Array, tau: Array, factors: list[float], epsilon: float) -> Array:
    changed = np.abs(tau) > np.float32(epsilon)
    count = changed.sum(axis=0)
    alone = np.array(factors)[:, None] * tau
    shared = tau / np.maximum(count, 1)
    return base + np.where(changed, np.where(count == 1, alone, shared), 0).sum(axis=0)


def overlaps(tau: Array, epsilon: float) -> list[float]:
    """Elements that a model changed with others over those that it alone changed."""
    changed = np.abs(tau) > np.float32(epsilon)
    alone = changed & (changed.sum(axis=0) == 1)
    return [(c.sum() - a.sum()) / a.sum() for c, a in zip(changed, alone, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 2, 5])
def test_ram(dtype: str, num: int) -> None:
    base, *tuned = models(num, (41, 53), dtype)
    tau = deltas(base, tuned)
    for epsilon in (1e-5, 1e-3):
        truth = true_ram(f64(base), tau, [1.0] * num, epsilon)
        result = merge("ram", base, tuned, epsilon=epsilon)
        assert_close(result, truth, dtype, slack=num * 2**-22 * np.abs(tau).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [2, 3])
def test_ramplus(dtype: str, num: int) -> None:
    base, *tuned = models(num, (41, 53), dtype)
    tau = deltas(base, tuned)
    rho = overlaps(tau, 1e-5)
    assert min(rho) > 0.2
    slack = num * 2**-21 * np.abs(tau).max()
    for alpha in (0.2, 10.0):
        local = [1 + 0.1 * min(alpha, each) for each in rho]
        truth = true_ram(f64(base), tau, local, 1e-5)
        assert_close(merge("ramplus_tl", base, tuned, alpha=alpha), truth, dtype, slack)
    official = [1 + (1.05 - 1) * min(1.0, each) for each in rho]
    truth = true_ram(f64(base), tau, official, 1e-5)
    result = merge("ramplus_tl", base, tuned, preset="official")
    assert_close(result, truth, dtype, slack)
    assert torch.equal(result, merge("ramplus_tl", base, tuned, preset="official", r=1.05))
    assert not torch.equal(result, merge("ramplus_tl", base, tuned, preset="official", r=1.5))


def test_ramplus_of_a_model_without_elements_of_its_own() -> None:
    """The authors' code divides by zero here; there is nothing for its factor to multiply."""
    base = torch.zeros(64)
    same = torch.linspace(0.1, 1, 64)
    more = same.clone()
    result = merge("ramplus_tl", base, [same, more], preset="official")
    torch.testing.assert_close(result, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 2, 5])
def test_magmax(dtype: str, num: int) -> None:
    base, *tuned = models(num, (41, 53), dtype)
    tau = deltas(base, tuned)
    best = tau[0]
    for each in tau[1:]:
        best = np.where(np.abs(each) >= np.abs(best), each, best)
    truth = f64(base) + 0.7 * best
    assert_close(merge("magmax", base, tuned, lambda_=0.7), truth, dtype, 2**-22 * 0.1)
    assert torch.equal(merge("magmax", base, tuned), merge("magmax", base, tuned, lambda_=0.5))


def test_magmax_takes_the_last_of_equal_magnitudes() -> None:
    base = torch.zeros(2)
    first, last = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert torch.equal(merge("magmax", base, [first, last], lambda_=1.0), last)
    assert torch.equal(merge("magmax", base, [last, first], lambda_=1.0), first)


def used(tau: Array, thresholds: list[float]) -> Array:
    """Which elements each task uses."""
    rest = np.abs(tau.sum(axis=0) - tau) * np.array(thresholds)[:, None]
    return np.abs(tau) > rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_consensus(dtype: str, num: int, k: int) -> None:
    base, *tuned = models(num, (41, 53), dtype)
    tau = deltas(base, tuned)
    thresholds = [0.3 + 0.1 * i for i in range(num)]
    stays = used(tau, thresholds).sum(axis=0) >= k
    truth = f64(base) + 0.3 * np.where(stays, tau.sum(axis=0), 0)
    result = merge("consensus_ta", base, tuned, lambda_t=thresholds, k=k, alpha=0.3)
    total = np.abs(tau).sum(axis=0)
    close = np.abs(np.abs(tau) - np.abs(tau.sum(axis=0) - tau) * np.array(thresholds)[:, None])
    sure = (close > 2**-20 * total).all(axis=0) | (total == 0)
    assert sure.mean() > 0.98
    result[torch.from_numpy(~sure).reshape(result.shape)] = 0
    assert_close(result, np.where(sure, truth, 0), dtype, slack=num * 2**-21 * 0.1)


def test_consensus_of_none_is_task_arithmetic() -> None:
    base, *tuned = models(3, (41, 53), "float32")
    result = merge("consensus_ta", base, tuned, k=0)
    torch.testing.assert_close(result, merge("task_arithmetic", base, tuned, weight=1.0))


def true_pcb(
    base: Array, tau: Array, weights: list[float], q: float, ratio: float, mode: str
) -> Array:
    """The authors' snippet in float64, with the variants of their other files."""
    n, d = tau.shape
    size = np.sort(np.abs(tau), axis=1)
    low, high = size[:, [int(d * q)]], size[:, [int(d * (1 - q) - 1)]]
    clipped = np.clip(np.abs(tau), low, high)
    width = np.where(high == low, 1, high - low)
    normal = (clipped - low) / width
    signed = np.sign(tau) * normal
    if mode == "raw":
        inter = np.tanh(tau * tau.sum(axis=0))
    elif mode == "normalized":
        inter = np.tanh(tau * signed.sum(axis=0))
    else:
        inter = np.tanh(signed[:, None] * signed[None]).sum(axis=1)
    score = np.exp(n * normal**2) * inter
    ranked = np.sort(score, axis=1)
    cut, top = ranked[:, [min(d - 1, int(d * (1 - ratio)))]], ranked[:, [d - 1]]
    share = (np.clip(score, cut, top) - cut) / np.where(top == cut, 1, top - cut)
    votes = np.array(weights)[:, None] * share * np.sign(tau) * clipped
    return base + votes.sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)


@pytest.mark.parametrize("mode", ["raw", "normalized", "pairwise"])
@pytest.mark.parametrize(("q", "ratio"), [(1e-4, 0.1), (0.01, 0.05), (0.0, 0.5), (0.2, 0.9)])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb(mode: str, q: float, ratio: float, scope: str) -> None:
    base, *tuned = models(3, (61, 67), "float32")
    tau = deltas(base, tuned)
    weights = [1.0, 1.2, 0.8]
    result = merge(
        "pcb", base, tuned, weight=weights, q=q, ratio=ratio, inter_mode=mode, scope=scope
    )
    truth = true_pcb(f64(base), tau, weights, q, ratio, mode)
    # A share is a difference of scores that carry some 1e-6 of the top; where all shares are of
    # that size their ratio is open, and nothing but the models' own clipped values bounds it.
    error = np.abs(f64(result) - truth)
    assert np.mean(error > 1e-3 * np.abs(tau).max()) < 0.01
    assert np.median(error) <= 2**-23 * 0.1
    assert np.all(error <= 2 * 1.2 * np.abs(tau).max())


@pytest.mark.parametrize("mode", ["raw", "normalized", "pairwise"])
def test_pcb_where_most_scores_are_negative(mode: str) -> None:
    """The cut is then a negative score, found among the magnitudes of those below zero."""
    generator = torch.Generator().manual_seed(5)
    base = torch.zeros(4099)
    first = torch.randn(4099, generator=generator)
    against = -first * (0.5 + torch.rand(4099, generator=generator)) * 3
    tuned = [first, against]
    tau = deltas(base, tuned)
    result = merge("pcb", base, tuned, weight=1.0, ratio=0.7, q=0.01, inter_mode=mode)
    truth = true_pcb(f64(base), tau, [1.0, 1.0], 0.01, 0.7, mode)
    error = np.abs(f64(result) - truth)
    assert np.mean(error > 1e-3) < 0.01


def test_pcb_of_equal_models_is_their_clipped_vector() -> None:
    """All elements have equal shares in all models; weights multiply."""
    base, tuned = models(1, (61, 67), "float32")
    result = merge("pcb", base, [tuned] * 3, weight=1.0, ratio=0.25, q=0.0)
    tau = deltas(base, [tuned])[0]
    found = f64(result) - f64(base)
    kept = found != 0
    assert 0.2 < kept.mean() <= 0.25
    np.testing.assert_allclose(found[kept], tau[kept], rtol=1e-4, atol=1e-8)
    assert np.abs(tau[kept]).min() > np.median(np.abs(tau[~kept]))


def test_pcb_of_unchanged_models_is_the_base() -> None:
    base, tuned = models(1, (61, 67), "bfloat16")
    assert torch.equal(merge("pcb", base, [base.clone(), base.clone()]), base)
    result = merge("pcb", base, [base.clone(), tuned], weight=1.0, q=0.0)
    assert torch.isfinite(result.float()).all()


def test_pcb_of_as_many_models_as_it_takes() -> None:
    """Scores stay finite where all agree, which in mode pairwise gives N·exp(N)."""
    most = get_method("pcb").spec.max_models
    assert most is not None
    base, tuned = models(1, (11, 13), "float32")
    for mode in ("raw", "normalized", "pairwise"):
        # The reference would take minutes for the scores of so many pairs.
        result = pymerge.merge_tensor(
            "pcb", base, [tuned] * most, backend="cpu", weight=1.0, q=0.0, inter_mode=mode
        )
        assert torch.isfinite(result).all()
    with pytest.raises(RecipeError, match=f"1 to {most}"):
        merge("pcb", base, [tuned] * (most + 1))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_refuses_what_it_cannot_rank(scope: str) -> None:
    base, *tuned = models(2, (61, 67), "float32")
    tuned[1][3, 4] = float("nan")
    with pytest.raises(PymergeError, match=r"not finite.*inspect --check"):
        merge("pcb", base, tuned, scope=scope)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (7,), (3, 5, 7)])
@pytest.mark.parametrize("num", [1, 3])
def test_shapes(method: str, shape: tuple[int, ...], num: int) -> None:
    base, *tuned = models(num, shape or (1,), "float32")
    arrays = [tensor.reshape(shape) for tensor in (base, *tuned)]
    result = merge(method, arrays[0], arrays[1:])
    assert result.shape == shape
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pcb"])
def test_nan_stays_where_it_is(method: str) -> None:
    base, *tuned = models(2, (61, 67), "float32")
    truth = merge(method, base, tuned)
    tuned[1][3, 4] = float("nan")
    result = merge(method, base, tuned)
    assert torch.isnan(result).nonzero().tolist() == [[3, 4]]
    result[3, 4] = truth[3, 4]
    if method != "ramplus_tl":  # one element more that both models changed
        assert torch.equal(result, truth)


@pytest.mark.parametrize("mode", ["raw", "normalized", "pairwise"])
@pytest.mark.parametrize("ratio", [0.1, 0.95])
def test_pcb_has_the_same_bytes_on_the_cpu(mode: str, ratio: float) -> None:
    base, *tuned = models(3, (61, 67), "bfloat16")
    found = [
        pymerge.merge_tensor("pcb", base, tuned, inter_mode=mode, ratio=ratio, backend=backend)
        for backend in ("reference", "cpu")
    ]
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


@settings(max_examples=15, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    official=st.booleans(),
    pieces=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_tiles_do_not_matter(method: str, official: bool, pieces: int, threads: int) -> None:
    base, *tuned = models(3, (97, 131), "bfloat16")
    parameters = {"preset": "official"} if official and method == "ramplus_tl" else {}
    whole = merge(method, base, tuned, **parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "TILE_ELEMENTS", 4096 * pieces)
        result = merge(method, base, tuned, threads=threads, **parameters)
    assert torch.equal(whole, result)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ramplus_tl", {"preset": "official", "epsilon": [{"filter": "norm", "value": 0.1}, 0.2]}),
        ("ramplus_tl", {"preset": [{"filter": "norm", "value": "mergekit"}, "official"]}),
        ("pcb", {"q": [{"filter": "norm", "value": 0.1}, 0.2]}),
        ("pcb", {"ratio": [{"filter": "norm", "value": 0.1}, 0.2]}),
    ],
)
def test_what_ranks_a_model_must_not_vary(
    method: str, parameters: dict[str, Any], model_folder: Any
) -> None:
    values = {
        name: [*value[:-1], {"value": value[-1]}] if isinstance(value, list) else value
        for name, value in parameters.items()
    }
    recipe = {
        "merge_method": method,
        "base_model": str(model_folder / "llama"),
        "models": [{"model": str(model_folder / "llama-finance")}],
        "parameters": values,
    }
    with pytest.raises(RecipeError, match=r"remove its .*filter"):
        pymerge.plan(recipe)
