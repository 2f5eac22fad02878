"""Gram matrices against float64 products, and their symmetry."""

from __future__ import annotations

import numpy as np
import pytest

from pymerge.errors import PymergeError
from pymerge.ops.matrix import gram, gram_acc
from pymerge.ops.reference import matrix as reference
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")

SHAPES = [(1, 1), (1, 7), (7, 1), (300, 129), (129, 300), (1030, 70), (70, 1030), (400, 600)]
#: Of ‖error‖_F to ‖x‖_F².
BOUND = {"float64": 1e-14, "float32": 1e-6}


def noise(m, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32))


def distance(found, exact, x):
    return np.linalg.norm(found.double().numpy() - exact) / float(x.double().square().sum())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_is_the_product(shape, side, dtype):
    x = noise(*shape)
    with Workspace(2) as ws, ws.active():
        found = gram(x, ws, side=side, dtype=dtype)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, found.t())
    assert distance(found, reference.gram(x, side=side), x) <= BOUND[dtype]


def test_a_transposed_view_gives_the_same_matrix():
    x = noise(200, 90)
    with Workspace(1) as ws, ws.active():
        found = gram(x.t(), ws, side="rows")
    assert distance(found, reference.gram(x, side="columns"), x) <= BOUND["float64"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("with_base", [False, True])
def test_gram_acc_adds_the_deltas(kind, side, with_base):
    batches = [noise(300, 300, seed).to(getattr(torch, kind)) for seed in (1, 2, 3)]
    base = noise(300, 300, 4).to(getattr(torch, kind)) if with_base else None
    total = torch.zeros(300, 300, dtype=torch.float64)
    exact = np.zeros((300, 300))
    with Workspace(2) as ws, ws.active():
        for x in batches:
            gram_acc(total, x, ws, side=side, base=base)
            wide = None if base is None else base.float().numpy()
            exact += reference.gram(x.float().numpy(), side=side, base=wide)
    assert torch.equal(total, total.t())
    assert np.linalg.norm(total.numpy() - exact) <= 1e-14 * np.trace(exact)


def test_no_float32_square_is_lost():
    """1e-30 squared is no float32 number."""
    x = noise(40, 20) * 1e-30
    with Workspace(1) as ws, ws.active():
        found = gram(x, ws, side="columns")
    np.testing.assert_allclose(found.numpy(), reference.gram(x, side="columns"), rtol=1e-10)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_empty_input_gives_zeros(shape, dtype):
    with Workspace(1) as ws, ws.active():
        found = gram(torch.empty(shape), ws, side="columns", dtype=dtype)
    assert torch.equal(found, torch.zeros(shape[1], shape[1], dtype=found.dtype))


def test_wrong_shapes_are_refused():
    x = noise(4, 3)
    with Workspace(1) as ws, ws.active():
        with pytest.raises(PymergeError, match="expected total"):
            gram_acc(torch.zeros(4, 4, dtype=torch.float64), x, ws)
        with pytest.raises(PymergeError, match="expected base"):
            gram_acc(torch.zeros(3, 3, dtype=torch.float64), x, ws, base=x.t())
        with pytest.raises(PymergeError, match="expected a matrix"):
            gram(x[0], ws, side="columns")
