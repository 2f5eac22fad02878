"""chebyshev_filter against an eigendecomposition in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pymerge.errors import PymergeError
from pymerge.ops.matrix.chebyshev import (
    chebyshev_filter,
    expansion,
    largest_eigenvalue,
    polynomial_filter,
)
from pymerge.ops.reference import solvers
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")


def symmetric(values, seed=0):
    """A float64 matrix of given eigenvalues."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    made = (vectors * np.asarray(values)) @ vectors.T
    return (made + made.T) / 2


def decaying(n, top=1.0):
    return symmetric(top * np.exp(-np.linspace(0, 12, n)))


def rows_of(num, n, seed=1):
    return np.random.default_rng(seed).standard_normal((num, n))


def run(c, theta, time, threads=1, dtype=torch.float64):
    given = (torch.as_tensor(x).to(dtype) for x in (c, theta))
    with Workspace(threads) as ws, ws.active():
        return chebyshev_filter(*given, ws, time=time)


def error(found, expected):
    return np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("time", [1e-3, 1.0, 46.0, 300.0, 1300.0, 1e5])
def test_it_is_the_filter_of_the_eigenvalues(time):
    c, theta = decaying(60), rows_of(40, 60)
    expected = solvers.spectral_filter(c, theta, time=time)
    assert error(run(c, theta, time), expected) <= 1e-7
    # What the recurrence rounds is relative to phi(0) = time, so it grows with the time.
    single = run(c, theta, time, dtype=torch.float32)
    assert error(single, expected) <= 3e-6 + 1e-8 * time


@pytest.mark.parametrize("time", [300.0, 1300.0])
def test_every_eigendirection_is_met(time):
    """The cut is relative to phi where it is least, so steep directions keep their digits."""
    c = decaying(50)
    _, vectors = np.linalg.eigh(c)
    expected = solvers.spectral_filter(c, vectors.T, time=time)
    found = run(c, vectors.T, time).numpy()
    assert (
        np.max(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)) < 1e-7
    )


def test_a_long_time_approaches_the_inverse():
    c, theta = symmetric(np.linspace(0.5, 1, 30)), rows_of(10, 30)
    expected = np.linalg.solve(c, theta.T).T
    assert error(run(c, theta, 200.0), expected) <= 1e-7


def test_rank_deficient_and_indefinite_by_rounding():
    values = np.r_[np.zeros(30), np.linspace(0.1, 2, 20)]
    c, theta = symmetric(values), rows_of(12, 50)
    rounded = c.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
    expected = solvers.spectral_filter(c, theta, time=100.0)
    assert error(run(rounded, theta, 100.0, dtype=torch.float32), expected) <= 1e-5


def test_zero_and_one_by_one():
    theta = rows_of(3, 4)
    assert error(run(np.zeros((4, 4)), theta, 7.0), 7.0 * theta) == 0
    assert run(np.zeros((4, 4)), theta, 0.0).eq(0).all()
    assert run(decaying(4), theta, 0.0).eq(0).all()
    assert run([[2.0]], [[3.0]], 5.0).item() == pytest.approx(-1.5 * math.expm1(-10), rel=1e-7)
    assert run(decaying(4), np.zeros((0, 4)), 5.0).shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_scales_far_from_one(scale):
    c, theta = decaying(30), rows_of(5, 30)
    expected = solvers.spectral_filter(c, theta, time=50.0)
    found = run(c * scale, theta, 50.0 / scale, dtype=torch.float32).double() * scale
    assert error(found, expected) <= 5e-6


def test_what_is_not_finite_gives_nan():
    c, theta = decaying(6), rows_of(3, 6)
    theta[1, 2] = np.nan
    found = run(c, theta, 10.0)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    for bad in (np.nan, np.inf):
        c[2, 3] = c[3, 2] = bad
        assert run(c, theta, 10.0).isnan().all()


def test_threads_do_not_change_a_bit():
    c, theta = decaying(64).astype(np.float32), rows_of(1100, 64).astype(np.float32)
    one, two, five = (run(c, theta, 100.0, threads=n, dtype=torch.float32) for n in (1, 2, 5))
    assert torch.equal(one, two)
    assert torch.equal(one, five)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    "values",
    [np.ones(40), np.r_[1.0, np.zeros(39)], np.exp(-np.linspace(0, 12, 90)), [0.5]],
    ids=["identity", "one direction", "decay", "single"],
)
def test_the_bound_holds_and_is_near(values, scale, dtype):
    c = torch.from_numpy(symmetric(values) * scale).to(dtype)
    with Workspace(2) as ws, ws.active():
        bound = largest_eigenvalue(c, ws)
    largest = np.linalg.eigvalsh(c.double().numpy())[-1]
    assert largest <= bound * (1 + 1e-12)
    assert bound <= len(values) ** 0.25 * largest * 1.01


def test_the_expansion_is_phi_on_the_whole_interval():
    for time, bound in [(1.0, 1e-9), (1.0, 1.0), (300.0, 0.15), (300.0, 1.0), (1300.0, 8.0)]:
        weights = expansion(time, bound, 2.0**-52)
        points = np.linspace(0, bound, 500)[1:]
        found = np.polynomial.chebyshev.chebval(2 * points / bound - 1, weights)
        expected = -np.expm1(-time * points) / points
        assert np.max(np.abs(found / expected - 1)) < 2e-7


def test_wrong_calls():
    c, theta = np.eye(4), rows_of(3, 4)
    with pytest.raises(PymergeError, match=r"time is -1\.0"):
        run(c, theta, -1.0)
    with pytest.raises(PymergeError, match="time is inf"):
        run(c, theta, math.inf)
    with pytest.raises(PymergeError, match="degree above"):
        run(c, theta, 1e9)
    with pytest.raises(PymergeError, match="theta is 3 x 4, expected 3 x 5"):
        run(np.eye(5), theta, 1.0)
    with pytest.raises(PymergeError, match="c is 3 x 4"):
        run(theta, theta, 1.0)


FUNCTIONS = {
    "constant": lambda x: 0 * x + 3.0,
    "cubic": lambda x: 1 - x + 2 * x**3,
    "bump": lambda x: 1 / (1 + 25 * (x - 0.3) ** 2),
    "zero": lambda x: 0 * x,
}


def any_filter(c, theta, phi, threads=1, dtype=torch.float64):
    given = (torch.as_tensor(x).to(dtype) for x in (c, theta))
    with Workspace(threads) as ws, ws.active():
        return polynomial_filter(*given, ws, phi)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_smooth_function_of_the_eigenvalues(name):
    phi = FUNCTIONS[name]
    c, theta = decaying(60), rows_of(40, 60)
    values, vectors = np.linalg.eigh(c)
    expected = theta @ (vectors * phi(values)) @ vectors.T
    largest = np.linalg.norm(theta) * np.abs(phi(np.linspace(0, 1.2, 99))).max()
    for dtype, bound in ((torch.float64, 1e-7), (torch.float32, 3e-6)):
        found = any_filter(c, theta, phi, dtype=dtype).double().numpy()
        assert np.linalg.norm(found - expected) <= bound * largest
    wide = rows_of(700, 60)
    assert torch.equal(any_filter(c, wide, phi), any_filter(c, wide, phi, threads=3))


def test_functions_that_no_polynomial_follows():
    c, theta = decaying(10), rows_of(3, 10)
    for phi in (lambda x: np.sign(x - 0.4), lambda x: x + math.inf):
        with pytest.raises(PymergeError, match="expected a function that a polynomial"):
            any_filter(c, theta, phi)
    c[2, 2] = math.nan
    assert any_filter(c, theta, lambda x: x).isnan().all()
