"""solve_spd against float64 solutions and its own residual measured apart."""

from __future__ import annotations

import numpy as np
import pytest

from pymerge.errors import PymergeError
from pymerge.ops.matrix.solve import solve_spd
from pymerge.ops.reference import solvers
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")


def gram(n, samples, decay=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, n)) * np.exp(-decay * np.arange(n) / n)
    return x.T @ x / samples


def right(n, columns, seed=1):
    return np.random.default_rng(seed).standard_normal((n, columns))


def run(a, b, threads=1, dtype=torch.float64, **options):
    given = (torch.as_tensor(x).to(dtype) for x in (a, b))
    with Workspace(threads) as ws, ws.active():
        return solve_spd(*given, ws, **options)


def residual(a, b, found):
    """Of the system that the solution says it solved, in float64."""
    a = np.asarray(a, np.float64)
    x = found.x.double().numpy()
    shift = found.ridge * np.mean(np.diag(a))
    return np.linalg.norm(b - a @ x - shift * x) / np.linalg.norm(b)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 10.0])
def test_it_solves_the_ridged_system(ridge):
    a, b = gram(80, 400), right(80, 30)
    expected = solvers.solve_spd(a, b, ridge=ridge)
    found = run(a, b, ridge=ridge)
    assert found.ridge == ridge
    assert np.linalg.norm(found.x.numpy() - expected) <= 1e-12 * np.linalg.norm(expected)
    single = run(a, b, dtype=torch.float32, ridge=ridge)
    assert single.x.dtype == torch.float32
    # The condition number is below 10 (Marchenko-Pastur at a ratio of 5).
    difference = np.linalg.norm(single.x.double().numpy() - expected)
    assert difference <= 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_is_the_true_one(dtype):
    a, b = gram(70, 100, decay=3), right(70, 300)
    a, b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    found = run(a, b, dtype=dtype, ridge=1e-5)
    true, eps = residual(a, b, found), torch.finfo(dtype).eps
    assert abs(found.residual - true) <= 0.5 * true + 100 * eps
    assert true <= 1e3 * eps


def test_a_condition_beyond_float32_is_factorised_in_float64():
    """Rounded to float32 the matrix stays positive, but its factorisation in float32 fails."""
    values = np.r_[np.ones(20), np.full(20, 3e-8)]
    vectors = np.linalg.qr(right(40, 40))[0]
    a = ((vectors * values) @ vectors.T).astype(np.float32).astype(np.float64)
    a = (a + a.T) / 2
    a += max(0.0, 1e-9 - np.linalg.eigvalsh(a)[0]) * np.eye(40)
    a = a.astype(np.float32).astype(np.float64)
    assert int(torch.linalg.cholesky_ex(torch.from_numpy(a).float()).info) != 0
    assert np.linalg.eigvalsh(a)[0] > 0
    b = a @ right(40, 5)
    found = run(a, b, dtype=torch.float32)
    assert found.ridge == 0
    assert residual(a, b, found) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_deficient_matrix_gets_a_ridge_that_is_reported(dtype):
    n, samples = 100, 30
    a = gram(n, samples)
    a = torch.from_numpy(a).to(dtype).double().numpy()
    wanted = right(n, 8)
    b = torch.from_numpy(a @ wanted).to(dtype).double().numpy()
    found = run(a, b, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert 0 < found.ridge <= 1e4 * eps
    tries = np.log10(found.ridge / eps)
    assert abs(tries - round(tries)) < 1e-6
    assert residual(a, b, found) <= 1e-3
    # A consistent system: the ridge costs its size against the least eigenvalue of the range.
    assert np.linalg.norm(a @ found.x.double().numpy() - b) <= 1e-3 * np.linalg.norm(b)


def test_a_small_ridge_asked_for_grows_by_tens():
    a = gram(60, 20).astype(np.float32)
    asked = 1e-12
    found = run(a, right(60, 2), dtype=torch.float32, ridge=asked)
    assert found.ridge >= asked
    assert np.isfinite(found.x.numpy()).all()


def test_threads_do_not_change_a_bit():
    a, b = gram(96, 200).astype(np.float32), right(96, 1300).astype(np.float32)
    one, two, five = (run(a, b, n, torch.float32, ridge=1e-4) for n in (1, 2, 5))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.x, five.x)
    assert one.residual == two.residual == five.residual


def test_operands_are_left_alone():
    a, b = torch.from_numpy(gram(10, 30)), torch.from_numpy(right(10, 3))
    before = a.clone(), b.clone()
    with Workspace() as ws, ws.active():
        solve_spd(a, b, ws, ridge=0.1)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_zero_one_and_none():
    nothing = run(np.zeros((5, 5)), right(5, 2), ridge=1e-3)
    assert nothing.x.eq(0).all()
    assert nothing.residual == 1
    assert run(np.zeros((5, 5)), np.zeros((5, 2))).residual == 0
    assert run([[4.0]], [[2.0]]).x.item() == 0.5
    assert run(gram(5, 20), np.zeros((5, 3))).residual == 0
    assert run(gram(5, 20), np.zeros((5, 0))).x.shape == (5, 0)
    assert run(np.zeros((0, 0)), np.zeros((0, 3))).x.shape == (0, 3)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_ridge_follows_the_scale(scale):
    a, b = gram(40, 90), right(40, 6)
    expected = solvers.solve_spd(a, b, ridge=1e-3)
    found = run(a * scale, b, dtype=torch.float32, ridge=1e-3)
    assert found.ridge == 1e-3
    difference = np.linalg.norm(found.x.double().numpy() * scale - expected)
    assert difference <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gives_nan(bad):
    a, b = gram(12, 40), right(12, 3)
    clean = run(a, b).x
    b[4, 1] = bad
    found = run(a, b)
    assert np.isnan(found.residual)
    assert not found.x[:, 1].isfinite().any()
    assert torch.allclose(found.x[:, [0, 2]], clean[:, [0, 2]], rtol=1e-12)
    a[3, 7] = a[7, 3] = bad
    assert run(a, b).x.isnan().all()


def test_wrong_calls():
    with pytest.raises(PymergeError, match="positive semi-definite"):
        run(-np.eye(4), right(4, 2))
    with pytest.raises(PymergeError, match="does not mend"):
        run(np.diag([1.0, 1.0, -5.0, 4.0]), right(4, 2))
    with pytest.raises(PymergeError, match=r"ridge is -1\.0"):
        run(np.eye(4), right(4, 2), ridge=-1.0)
    with pytest.raises(PymergeError, match="b is 5 x 2, expected 4 x 2"):
        run(np.eye(4), right(5, 2))
    with pytest.raises(PymergeError, match="a is 4 x 5"):
        run(right(4, 5), right(4, 2))
