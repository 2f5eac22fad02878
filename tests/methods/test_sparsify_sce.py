"""SCE against a float64 computation of its formula, written here from the specification."""

from __future__ import annotations

import numpy as np
import pytest

import pymerge

BACKENDS = ["reference", "cpu"]


def models(
    num: int, shape: tuple[int, ...], scale: float = 1.0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Task vectors of different sizes on a grid, a third of them equal in all models."""
    random = np.random.default_rng([num, *shape])
    base = random.integers(-60, 60, shape) / 4096
    shared = random.integers(-9, 10, shape) / 4096
    same = random.random(shape) < 1 / 3
    tuned = []
    for i in range(num):
        own = random.integers(-9 - 4 * i, 10 + 4 * i, shape) / 4096
        tuned.append(base + np.where(same, shared, own))
    return (
        np.asarray(scale * base, np.float32),
        [np.asarray(scale * each, np.float32) for each in tuned],
    )


def sce(
    base: np.ndarray, tuned: list[np.ndarray], topk: float, mask: str, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    """The merge, and where the selection is open: float32 may rank nearly equal variances apart."""
    tau = np.stack([x.astype(np.float64) - base for x in tuned]).reshape(len(tuned), -1)
    variance = tau.var(axis=0)
    selected = np.ones(tau.shape[1], bool)
    if topk < 1:
        k = int(np.count_nonzero(variance > 1e-18) * topk)
        selected[np.argsort(-variance, kind="stable")[k:]] = False
        if k and not selected.all():
            limit = np.sort(variance)[::-1][k - 1]
            is_open = np.abs(variance - limit) <= limit * 1e-6
        else:
            is_open = np.zeros_like(selected)
    else:
        is_open = np.zeros_like(selected)
    squares = (tau**2 * selected).mean(axis=1)
    total = squares.sum()
    equal = total == 0 or total < smallest
    weights = np.full(len(tuned), 1 / len(tuned)) if equal else squares / total
    if mask == "merge":
        tau = tau * selected
    agrees = np.sign(tau) == np.where(tau.sum(axis=0) >= 0, 1, -1)
    shares = weights[:, None] * agrees
    divisor = shares.sum(axis=0)
    merged = (tau * shares).sum(axis=0) / np.where(divisor == 0, 1, divisor)
    return base + merged.reshape(base.shape), is_open.reshape(base.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("shape", [(40, 50), (77,), (), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("mask", ["merge", "weights"])
def test_sce(backend: str, num: int, shape: tuple[int, ...], topk: float, mask: str) -> None:
    base, tuned = models(num, shape)
    found = pymerge.merge_tensor("sce", base, tuned, select_topk=topk, mask=mask, backend=backend)
    assert found.shape == shape
    if not found.size:
        return
    truth, is_open = sce(base, tuned, topk, mask, 0.0)
    # Which of the nearly equal variances are selected moves the weights a little.
    slack = 1e-2 * np.count_nonzero(is_open) / found.size
    close = np.isclose(found, truth, rtol=2**-20, atol=2**-24 + slack * 2**-8)
    assert np.all(close | (is_open & (mask == "merge")))
    if topk == 0.4 and shape == (40, 50) and num > 1:
        assert not np.allclose(truth, sce(base, tuned, 1.0, mask, 0.0)[0])


def test_equal_variances_are_selected_in_index_order() -> None:
    base = np.zeros(12, np.float32)
    first = np.array([1, 2, 0, 2, 1, 2, 0, 2, 1, 2, 0, 2], np.float32)
    found = pymerge.merge_tensor(
        "sce", base, [first, -first / 2], select_topk=0.34, backend="reference"
    )
    # Nine vary, so int(0.34 * 9) = 3 are selected: the first three of the six largest.
    assert np.array_equal(np.flatnonzero(found), [1, 3, 5])


def test_the_scale_of_the_models_does_not_matter_unless_asked() -> None:
    """Powers of two scale a merge exactly; mergekit's absolute threshold makes weights equal."""
    merge = {
        scale: {
            smallest: pymerge.merge_tensor(
                "sce",
                *models(3, (40, 50), scale),
                select_topk=0.5,
                smallest_sum=smallest,
                backend="reference",
            )
            / np.float32(scale)
            for smallest in (0.0, 1e-6)
        }
        for scale in (1.0, 2.0**-12)
    }
    assert np.array_equal(merge[1.0][0.0], merge[2.0**-12][0.0])
    assert np.array_equal(merge[1.0][0.0], merge[1.0][1e-6])
    assert not np.allclose(merge[2.0**-12][0.0], merge[2.0**-12][1e-6], rtol=1e-3)
    base, tuned = models(3, (40, 50), 2.0**-12)
    truth, _ = sce(base, tuned, 1.0, "merge", 1e-6)
    found = pymerge.merge_tensor("sce", base, tuned, smallest_sum=1e-6, backend="reference")
    np.testing.assert_allclose(found, truth, rtol=2**-20, atol=2**-38)
