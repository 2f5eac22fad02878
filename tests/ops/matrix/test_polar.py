"""Polar factors against a float64 SVD, and the properties that define them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from spectra import conditioned, duplicated, gaussian, integers, with_values

from pymerge.errors import PymergeError
from pymerge.ops.matrix import inverse_sqrt, polar
from pymerge.ops.reference import matrix as reference
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")

FULL_RANK = {
    "square": gaussian(200, 200),
    "tall": gaussian(500, 150),
    "barely-tall": gaussian(230, 170),
    "wide": gaussian(150, 500),
    "small": gaussian(7, 5),
    "one-row": gaussian(1, 300),
    "one-column": gaussian(300, 1),
    "power-law": with_values(200, 260, 1.0 / np.arange(1, 201)),
    "one-large": with_values(200, 160, np.r_[1.0, np.full(159, 1e-3)]),
    "condition-1e2": conditioned(180, 180, 1e2),
    "condition-1e4": conditioned(180, 240, 1e4),
    "tiny": gaussian(160, 180) * np.float32(1e-20),
    "subnormal": gaussian(20, 30) * np.float32(1e-36),
    "huge": gaussian(180, 160) * np.float32(1e20),
    "orthogonal": np.linalg.qr(gaussian(160, 160))[0],
    "identity": np.eye(150, dtype=np.float32),
}
DEFICIENT = {
    "rank-20": integers(200, 180, 20),
    "rank-1": integers(150, 200, 1),
    "duplicated": duplicated(180, 200),
    "duplicated-tall": duplicated(300, 200).T,
    "zero-rows": np.r_[gaussian(150, 180), np.zeros((30, 180), np.float32)],
    # float32 rounding leaves values of 1e-8 where there were none.
    "rounded-product": with_values(200, 220, np.geomspace(1, 0.1, 30)),
}
EVERY = {**FULL_RANK, **DEFICIENT}
FAITHFUL = ["auto", "gram", "qdwh"]


def run(x, threads=2, **options):
    with Workspace(threads) as ws, ws.active():
        return polar(torch.from_numpy(np.ascontiguousarray(x)), ws, **options)


@functools.cache
def factored(name, route="auto"):
    return run(EVERY[name], route=route)


@functools.cache
def truth(name):
    return reference.polar(EVERY[name])


def error(found, exact):
    return np.linalg.norm(found.factor.double().numpy() - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("route", FAITHFUL)
@pytest.mark.parametrize("name", EVERY)
def test_the_factor_is_that_of_the_svd(name, route):
    exact, rank, nuclear = truth(name)
    found = factored(name, route)
    assert found.factor.dtype == torch.float32
    assert found.factor.shape == exact.shape
    assert error(found, exact) <= 1e-5
    assert found.rank == rank
    assert found.nuclear == pytest.approx(nuclear, rel=1e-6)


@pytest.mark.parametrize("name", FULL_RANK)
def test_products_alone_come_near_it(name):
    """float32 iterations lose what the condition number magnifies."""
    exact, rank, nuclear = truth(name)
    found = factored(name, "iterate")
    values = np.linalg.svd(EVERY[name].astype(np.float64), compute_uv=False)
    assert error(found, exact) <= max(2e-5, 3e-8 * values[0] / values[-1])
    assert found.rank == rank
    assert found.nuclear == pytest.approx(nuclear, rel=1e-6)


@pytest.mark.parametrize("name", DEFICIENT)
def test_products_alone_give_way_to_the_gram_route(name):
    exact, rank, _ = truth(name)
    found = factored(name, "iterate")
    assert found.rank == rank
    assert error(found, exact) <= 1e-5


@pytest.mark.parametrize("condition", [1e5, 1e6])
@pytest.mark.parametrize("route", FAITHFUL)
def test_beyond_1e4_it_is_as_good_as_a_float32_svd(condition, route):
    x = conditioned(200, 200, condition / 2)
    exact = reference.polar(x)[0]
    assert error(run(x, route=route), exact) <= 6e-8 * condition


@pytest.mark.parametrize("route", [*FAITHFUL, "iterate"])
@pytest.mark.parametrize("name", EVERY)
def test_rows_or_columns_are_orthonormal(name, route):
    """P Pᵀ P = P, and the rank is the squared norm."""
    found = factored(name, route)
    p = found.factor.double()
    assert float((p @ p.t() @ p - p).norm() / p.norm()) <= 2e-6
    assert float(p.square().sum()) == pytest.approx(found.rank, rel=1e-5)
    assert 0 <= found.residual <= 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_the_other_factor_is_positive_semidefinite(name):
    x = EVERY[name].astype(np.float64)
    hermitian = factored(name).factor.double().numpy().T @ x
    norm = np.linalg.norm(x)
    assert np.linalg.norm(hermitian - hermitian.T) <= 4e-6 * norm
    assert np.linalg.eigvalsh((hermitian + hermitian.T) / 2)[0] >= -4e-6 * norm


def test_the_cut_drops_what_is_below_it():
    x = with_values(150, 160, np.r_[np.linspace(1, 0.5, 100), np.full(50, 1e-3)])
    for route in FAITHFUL:
        assert run(x, route=route, cut=1e-2).rank == 100
        assert run(x, route=route, cut=1e-4).rank == 150
        exact = reference.polar(x, cut=1e-2)[0]
        assert error(run(x, route=route, cut=1e-2), exact) <= 1e-5


@pytest.mark.parametrize("route", [*FAITHFUL, "iterate"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 4), (200, 150)], ids=str)
def test_zero_and_empty_input_have_rank_0(shape, route):
    found = run(np.zeros(shape, np.float32), route=route)
    assert torch.equal(found.factor, torch.zeros(shape))
    assert found[1:] == (0, 0.0, 0.0)


@pytest.mark.parametrize("route", [*FAITHFUL, "iterate"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_gives_nan(bad, route):
    x = gaussian(150, 140)
    x[3, 4] = bad
    found = run(x, route=route)
    assert bool(torch.isnan(found.factor).all())
    assert found.rank == 0
    assert np.isnan(found.nuclear)
    assert np.isnan(found.residual)


def test_wrong_arguments_are_refused():
    with pytest.raises(PymergeError, match="matrix"):
        run(np.zeros(3, np.float32))
    for cut in (1e-7, 2.0, float("nan")):
        with pytest.raises(PymergeError, match="cut"):
            run(np.zeros((3, 3), np.float32), cut=cut)


@pytest.mark.parametrize("rank", [1, 40, 90])
def test_inverse_sqrt_inverts_on_what_it_keeps(rank):
    x = (gaussian(rank, 200) if rank < 90 else gaussian(300, 90)).astype(np.float64)
    g = x.T @ x
    with Workspace(2) as ws, ws.active():
        root, found = inverse_sqrt(torch.from_numpy(g), ws)
    exact, _ = reference.inverse_sqrt(g)
    assert found == rank
    assert np.linalg.norm(root.numpy() - exact) <= 1e-9 * np.linalg.norm(exact)
    projection = root.numpy() @ g @ root.numpy()
    assert np.linalg.norm(projection @ projection - projection) <= 1e-9


def test_inverse_sqrt_of_nothing():
    with Workspace(1) as ws, ws.active():
        root, rank = inverse_sqrt(torch.zeros(4, 4, dtype=torch.float64), ws)
        assert rank == 0
        assert torch.equal(root, torch.zeros(4, 4, dtype=torch.float64))
        root, rank = inverse_sqrt(torch.full((4, 4), float("nan"), dtype=torch.float64), ws)
        assert rank == 0
        assert bool(torch.isnan(root).all())
