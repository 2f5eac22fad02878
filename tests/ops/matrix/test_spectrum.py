"""Decompositions against float64 LAPACK and the properties that define them."""

from __future__ import annotations

import numpy as np
import pytest
from spectra import conditioned, duplicated, gaussian, integers, with_values

from pymerge.errors import PymergeError
from pymerge.ops.matrix import gram_eigh, svt, truncated_svd
from pymerge.ops.reference import matrix as reference
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")

INPUTS = {
    "square": gaussian(150, 150),
    "tall": gaussian(400, 90),
    "wide": gaussian(90, 400),
    "power-law": with_values(200, 260, 1.0 / np.arange(1, 201)),
    "condition-1e4": conditioned(180, 140, 1e4),
    "condition-1e6": conditioned(140, 180, 1e6),
    "rank-20": integers(200, 120, 20),
    "duplicated": duplicated(120, 150),
    "one-row": gaussian(1, 30),
    "one-column": gaussian(30, 1),
    "tiny": gaussian(60, 80) * np.float32(1e-20),
    "huge": gaussian(80, 60) * np.float32(1e20),
}
EVERY = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())


def on(function, x, *args, **options):
    with Workspace(2) as ws, ws.active():
        return function(torch.from_numpy(x), *args, ws, **options)


def assembled(found):
    return (found.left.double() * found.values) @ found.right.double()


def orthonormality(columns):
    columns = columns.double()
    return float((columns.t() @ columns - torch.eye(columns.shape[1])).abs().max())


@pytest.mark.parametrize("size", [1, 2, 50, 300])
def test_gram_eigh_decomposes(size):
    x = gaussian(size + 3, size).astype(np.float64)
    g = torch.from_numpy(x.T @ x)
    with Workspace(2) as ws, ws.active():
        values, vectors = gram_eigh(g, ws)
    assert bool((values[:-1] >= values[1:]).all())
    assert float((g - (vectors * values) @ vectors.t()).norm() / g.norm()) <= 1e-13
    assert orthonormality(vectors) <= 1e-12


def test_gram_eigh_clamps_what_rounding_made_negative():
    x = integers(100, 80, 5).astype(np.float64)
    with Workspace(1) as ws, ws.active():
        values, _ = gram_eigh(torch.from_numpy(x.T @ x), ws)
    assert float(values.min()) >= 0
    assert np.linalg.matrix_rank(x) == int((values > 1e-10 * values[0]).sum())


@EVERY
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_truncation_leaves_out_the_least(x, fraction):
    """Eckart and Young: no matrix of this rank is nearer."""
    rank = max(1, round(fraction * min(x.shape)))
    _, values, _, least = reference.truncated_svd(x, rank)
    found = on(lambda t, ws: truncated_svd(t, rank, ws), x)
    energy = np.sum(x.astype(np.float64) ** 2)
    left_out = np.sum((x.astype(np.float64) - assembled(found).numpy()) ** 2)
    assert left_out <= least + 1e-12 * energy
    assert abs(found.tail - least) <= 1e-12 * energy
    assert found.tail >= 0
    # A value at the cut may fall on either side of it.
    assert abs(len(found.values) - len(values)) <= 1
    k = min(len(found.values), len(values))
    np.testing.assert_allclose(found.values[:k], values[:k], rtol=1e-9, atol=1e-10 * values[0])


@EVERY
def test_vectors_are_orthonormal(x):
    found = on(lambda t, ws: truncated_svd(t, min(x.shape), ws), x)
    assert found.left.shape[0] == x.shape[0]
    assert found.right.shape[1] == x.shape[1]
    condition = float(found.values[0] / found.values[-1])
    # Of the side that was found by a product; errors of the Gram grow as the condition squared.
    bound = 1e-12 + 1e-15 * condition**2
    assert orthonormality(found.left) <= bound
    assert orthonormality(found.right.t()) <= bound
    assert bool((found.values[:-1] >= found.values[1:]).all())


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("name", ["square", "tall", "wide", "power-law", "tiny", "huge"])
def test_float32_route_is_near_the_least(name, rank):
    x = INPUTS[name]
    least = reference.truncated_svd(x, rank)[3]
    found = on(lambda t, ws: truncated_svd(t, rank, ws, dtype="float32"), x)
    assert found.left.dtype == found.right.dtype == torch.float32
    energy = np.sum(x.astype(np.float64) ** 2)
    left_out = np.sum((x.astype(np.float64) - assembled(found).numpy()) ** 2)
    assert left_out <= least + 1e-6 * energy
    assert abs(found.tail - left_out) <= 1e-6 * energy


@pytest.mark.parametrize("name", ["square", "tall", "wide", "power-law", "rank-20", "tiny", "huge"])
def test_randomized_route_certifies_what_it_left_out(name):
    x = INPUTS[name]
    least = reference.truncated_svd(x, 15)[3]
    found = on(lambda t, ws: truncated_svd(t, 15, ws, route="randomized"), x)
    energy = np.sum(x.astype(np.float64) ** 2)
    left_out = np.sum((x.astype(np.float64) - assembled(found).numpy()) ** 2)
    assert abs(found.tail - left_out) <= 1e-10 * energy
    # Twice the rank and six steps come within 1 % of the least on every spectrum of the table.
    assert left_out <= 1.01 * least + 1e-10 * energy


@EVERY
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.95, 2.0])
def test_svt_is_the_proximal_map(x, quantile):
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    threshold = 2 * values[0] if quantile > 1 else float(np.quantile(values, quantile)) * 0.999
    found = on(lambda t, ws: svt(t, threshold, ws), x)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    error = np.linalg.norm(found.double().numpy() - reference.svt(x, threshold))
    assert error <= 1e-6 * np.linalg.norm(x.astype(np.float64))


def test_svt_in_float32():
    x = INPUTS["power-law"]
    error = np.linalg.norm(
        on(lambda t, ws: svt(t, 0.05, ws, dtype="float32"), x).numpy() - reference.svt(x, 0.05)
    )
    assert error <= 1e-3 * np.linalg.norm(x)


@pytest.mark.parametrize("route", ["gram", "randomized"])
@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (6, 4)], ids=str)
def test_zero_and_empty_input_have_no_directions(route, shape):
    x = np.zeros(shape, np.float32)
    found = on(lambda t, ws: truncated_svd(t, 3, ws, route=route), x)
    assert found.left.shape == (shape[0], 0)
    assert found.right.shape == (0, shape[1])
    assert found.tail == 0
    assert torch.equal(on(lambda t, ws: svt(t, 0.1, ws), x), torch.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_gives_nan(bad):
    x = gaussian(20, 30)
    x[3, 4] = bad
    found = on(lambda t, ws: truncated_svd(t, 5, ws), x)
    for part in (found.left, found.values, found.right):
        assert bool(torch.isnan(part).all())
    assert found.values.shape == (5,)
    assert np.isnan(found.tail)
    assert bool(torch.isnan(on(lambda t, ws: svt(t, 0.1, ws), x)).all())


def test_wrong_arguments_are_refused():
    x = gaussian(4, 3)
    with pytest.raises(PymergeError, match="rank"):
        on(lambda t, ws: truncated_svd(t, -1, ws), x)
    with pytest.raises(PymergeError, match="matrix"):
        on(lambda t, ws: truncated_svd(t[0], 1, ws), x)
    with pytest.raises(PymergeError, match="threshold"):
        on(lambda t, ws: svt(t, -1.0, ws), x)
