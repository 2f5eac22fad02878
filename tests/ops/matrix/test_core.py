"""Core space against products of the factors in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.errors import PymergeError
from pymerge.ops.matrix.core import core_space
from pymerge.ops.workspace import Workspace

#: Rows, columns, ranks of the updates.
SHAPES = [
    (40, 56, (4, 4, 4)),
    (300, 70, (8, 1, 3)),
    (64, 300, (16,)),
    (12, 90, (8, 8)),  # more ranks than rows
    (9, 7, (8, 8, 5)),  # more ranks than rows or columns
    (1, 5, (1, 1)),
]


def make(rows, columns, ranks, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(rows, r)), rng.normal(size=(r, columns))) for r in ranks]


def tensors(factors, dtype):
    return [tuple(torch.from_numpy(each).to(dtype) for each in pair) for pair in factors]


def check(factors, ws, dtype, bound):
    """Orthonormal bases, and every update back from its core within ``bound`` of its norm."""
    given = tensors(factors, getattr(torch, dtype))
    core = core_space(given, ws, dtype=dtype)
    total = sum(left.shape[1] for left, _ in factors)
    rows, columns = factors[0][0].shape[0], factors[0][1].shape[1]
    for basis, size in ((core.left, rows), (core.right, columns)):
        assert basis.shape == (size, min(size, total))
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(gram.shape[0], dtype=torch.float64)).abs().max() < bound
    for (left, right), each in zip(given, core.cores, strict=True):
        assert each.dtype == torch.float64
        truth = left.double().numpy() @ right.double().numpy()
        found = core.left.double().numpy() @ each.numpy() @ core.right.double().numpy().T
        assert np.linalg.norm(found - truth) <= bound * np.linalg.norm(truth)
        expanded = core.expand(each, ws, dtype="float64").numpy()
        assert np.linalg.norm(expanded - truth) <= bound * np.linalg.norm(truth)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize(("rows", "columns", "ranks"), SHAPES)
def test_updates_come_back(rows, columns, ranks, dtype, bound):
    with Workspace() as ws, ws.active():
        check(make(rows, columns, ranks), ws, dtype, bound)


def test_rank_deficient_stacks():
    """Duplicated, zero and parallel updates: the bases stay orthonormal."""
    left, right = make(50, 30, (4,))[0]
    zero = (np.zeros((50, 4)), np.zeros((4, 30)))
    other = make(50, 30, (4,), seed=1)[0]
    with Workspace() as ws, ws.active():
        check([(left, right), (left, right), zero, (2 * left, other[1])], ws, "float64", 1e-12)
        core = core_space(tensors([zero, zero], torch.float32), ws)
        assert all(not each.any() for each in core.cores)
        assert not core.expand(core.cores[0], ws).any()


def test_norms_and_products_are_those_of_the_updates():
    """What a method that commutes with isometries sees: inner products, singular values."""
    factors = make(60, 45, (5, 5, 5))
    dense = [left @ right for left, right in factors]
    with Workspace() as ws, ws.active():
        cores = core_space(tensors(factors, torch.float64), ws).cores
    for i, one in enumerate(dense):
        for j, two in enumerate(dense):
            found = float((cores[i] * cores[j]).sum())
            scale = np.linalg.norm(one) * np.linalg.norm(two)
            assert abs(found - np.sum(one * two)) < 1e-13 * scale
    values = np.linalg.svd(sum(dense), compute_uv=False)[:15]
    found = torch.linalg.svdvals(sum(cores)).numpy()
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-13 * values[0])


def test_the_polar_factor_of_a_sum():
    """The core's polar factor, expanded, is the partial isometry of the dense sum."""
    factors = make(60, 45, (4, 4, 4))
    u, _, vt = np.linalg.svd(sum(left @ right for left, right in factors))
    with Workspace() as ws, ws.active():
        core = core_space(tensors(factors, torch.float64), ws)
        a, _, b = torch.linalg.svd(sum(core.cores))
        found = core.expand(a @ b, ws, dtype="float64").numpy()
    truth = u[:, :12] @ vt[:12]
    assert np.linalg.norm(found - truth) < 1e-11 * np.linalg.norm(truth)


def test_threads_do_not_change_a_bit():
    factors = tensors(make(700, 400, (16, 16)), torch.float32)
    results = []
    for threads in (1, 2, 3):
        with Workspace(threads) as ws, ws.active():
            core = core_space(factors, ws)
            results.append((core.left, core.right, *core.cores, core.expand(core.cores[1], ws)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([], "at least one pair"),
        ([((4, 2), (3, 5))], "pair 0"),
        ([((4, 2), (2, 5)), ((4, 2), (2, 6))], "pair 1"),
        ([((4, 2), (2, 5)), ((2,), (2, 5))], "pair 1"),
    ],
)
def test_shapes_that_do_not_fit(shapes, words):
    factors = [tuple(torch.zeros(shape) for shape in pair) for pair in shapes]
    with Workspace() as ws, pytest.raises(PymergeError, match=words):
        core_space(factors, ws)
