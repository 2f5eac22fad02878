"""adam_quadratic against torch.optim.Adam on the tasks, and against the loop in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pymerge.errors import PymergeError
from pymerge.ops import reference, view
from pymerge.ops.matrix import adam
from pymerge.ops.matrix.adam import adam_quadratic
from pymerge.ops.reference import solvers
from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")


def tasks(rows, columns, num=4, rms=4e-3, seed=0):
    """Deltas with a decaying spectrum, as fine-tuning leaves them; their weights 1 / ||tau||^2."""
    rng = np.random.default_rng(seed)
    short = min(rows, columns)
    taus = []
    for _ in range(num):
        left = np.linalg.qr(rng.standard_normal((rows, short)))[0]
        right = np.linalg.qr(rng.standard_normal((columns, short)))[0]
        tau = (left * 0.8 ** np.arange(short)) @ right.T
        tau += 0.02 * rng.standard_normal((rows, columns)) / short
        taus.append((tau * rms / np.sqrt(np.mean(tau**2))).astype(np.float32).astype(np.float64))
    return taus, [1 / np.sum(tau**2) for tau in taus]


def official(theta, taus, weights, *, steps, lr, betas=(0.9, 0.999), eps=1e-8):
    """The loop of the authors: autograd through the loss, torch.optim.Adam."""
    parameter = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=lr, betas=betas, eps=eps)
    deltas = [torch.from_numpy(tau).to(theta) for tau in taus]
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [
            weight * torch.square((parameter - tau) @ tau.T).sum()
            for tau, weight in zip(deltas, weights, strict=True)
        ]
        sum(losses).backward()
        optimizer.step()
    return parameter.detach()


def operands(taus, weights, dtype=torch.float32):
    c, d = solvers.quadratic_of(taus, weights)
    theta = torch.from_numpy(np.sum(taus, axis=0)).to(dtype)
    return theta, torch.from_numpy(c).to(dtype), torch.from_numpy(d).to(dtype)


def run(theta, c, d, threads=1, **options):
    with Workspace(threads) as ws, ws.active():
        return adam_quadratic(theta, c, d, ws, **options)


def relative(found, expected):
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("rows", "columns", "rms", "lr"),
    [(48, 32, 4e-3, 1e-5), (32, 48, 2.7e-4, 1e-5), (140, 20, 4e-3, 2e-5), (7, 5, 1.0, 1e-2)],
)
def test_the_iterates_are_those_of_torch_on_the_tasks(rows, columns, rms, lr):
    taus, weights = tasks(rows, columns, rms=rms)
    theta, c, d = operands(taus, weights)
    before = theta.clone()
    found = run(theta, c, d, steps=300, lr=lr)
    expected = official(theta, taus, weights, steps=300, lr=lr)
    assert torch.equal(theta, before)
    assert relative(expected, theta) > 1e-4
    assert relative(found, expected) <= 1e-5


def test_the_iterates_in_float64_are_those_of_the_textbook():
    taus, weights = tasks(40, 30)
    theta, c, d = operands(taus, weights, torch.float64)
    found = run(theta, c, d, steps=300, lr=1e-5)
    expected = solvers.adam(theta.numpy(), taus, weights, steps=300, lr=1e-5)
    assert relative(found, torch.from_numpy(expected)) <= 1e-11


def test_other_betas_and_eps():
    taus, weights = tasks(30, 20)
    theta, c, d = operands(taus, weights)
    options = {"steps": 50, "lr": 1e-4, "betas": (0.5, 0.9), "eps": 1e-4}
    expected = official(theta, taus, weights, **options)
    assert relative(run(theta, c, d, **options), expected) <= 1e-6


def test_a_task_without_a_delta_does_not_count():
    taus, weights = tasks(20, 12, num=2)
    theta, c, d = operands(taus, weights)
    more = operands([*taus, np.zeros_like(taus[0])], [*weights, 0.0])
    assert torch.equal(run(theta, c, d, steps=20, lr=1e-5), run(*more, steps=20, lr=1e-5))


def test_threads_do_not_change_a_bit():
    taus, weights = tasks(700, 48)
    operand = operands(taus, weights)
    one, two, five = (run(*operand, threads=n, steps=25, lr=1e-5) for n in (1, 2, 5))
    assert torch.equal(one, two)
    assert torch.equal(one, five)


def test_no_steps_leave_theta():
    taus, weights = tasks(9, 6)
    theta, c, d = operands(taus, weights)
    found = run(theta, c, d, steps=0, lr=1e-5)
    assert torch.equal(found, theta)
    assert found.data_ptr() != theta.data_ptr()


def test_a_zero_quadratic_leaves_theta():
    theta = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(4, 4)
    assert torch.equal(run(theta, zero, torch.zeros(5, 4), steps=30, lr=1e-3), theta)


def test_one_column_and_no_rows():
    theta, c = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    # Far from the minimum Adam moves by the learning rate a step.
    assert run(theta, c, torch.zeros(1, 1), steps=10, lr=1e-3).item() == pytest.approx(1.99)
    assert run(torch.zeros(0, 1), c, torch.zeros(0, 1), steps=3, lr=1e-3).shape == (0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    taus, weights = tasks(6, 5)
    theta, c, d = operands(taus, weights)
    clean = run(theta, c, d, steps=5, lr=1e-5)
    theta[2, 3] = bad
    found = run(theta, c, d, steps=5, lr=1e-5)
    assert found[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert torch.allclose(found[rest], clean[rest], rtol=1e-6, atol=0)
    c[0, 0] = float("nan")
    assert run(theta, c, d, steps=5, lr=1e-5).isnan().all()


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_scales_far_from_one(scale):
    taus, weights = tasks(20, 16, rms=scale)
    theta, c, d = operands(taus, weights)
    options = {"steps": 40, "lr": 1e-3 * scale, "eps": 1e-8 * scale}
    assert relative(run(theta, c, d, **options), official(theta, taus, weights, **options)) <= 1e-5


def test_the_run_can_be_given_up_between_steps():
    class Stop(Exception):
        pass

    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Stop

    taus, weights = tasks(8, 8)
    with Workspace(1, check=check) as ws, ws.active(), pytest.raises(Stop):
        adam_quadratic(*operands(taus, weights), ws, steps=1000, lr=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"c": torch.zeros(4, 3)}, "c is 4 x 3"),
        ({"d": torch.zeros(5, 3)}, "d is 5 x 3, expected 5 x 4"),
        ({"theta": torch.zeros(5, 4, dtype=torch.float64)}, "one type"),
        ({"theta": torch.zeros(5, 4, dtype=torch.bfloat16)}, "theta is bfloat16"),
        ({"theta": torch.zeros(4)}, "1 dimensions"),
    ],
)
def test_wrong_calls(change, message):
    given = {"theta": torch.zeros(5, 4), "c": torch.zeros(4, 4), "d": torch.zeros(5, 4)}
    given |= {"steps": 1, "lr": 1e-5} | change
    with Workspace() as ws, pytest.raises(PymergeError, match=message):
        adam_quadratic(given.pop("theta"), given.pop("c"), given.pop("d"), ws, **given)


@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.0, 0.5), 1e-3)])
def test_the_op_adam_step_is_a_step_of_torch(betas, eps):
    """The truth that every backend repeats bit by bit."""
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(40, 300, generator=generator) * 1e-3
    theta = torch.randn(300, generator=generator)
    parameter = theta.double().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=1e-2, betas=betas, eps=eps)
    state = [theta.clone(), torch.zeros(300), torch.zeros(300)]
    for number, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient.double()
        optimizer.step()
        views = [view(part) for part in (*state, gradient)]
        options = {"lr": 1e-2, "beta1": betas[0], "beta2": betas[1], "eps": eps, "step": number}
        assert reference.adam_step(*views, **options) == 0
    assert relative(state[0], parameter.detach()) <= 1e-6
    assert relative(state[0], theta) > 1e-2


def test_the_fused_step_and_the_plain_one_agree(monkeypatch):
    taus, weights = tasks(50, 40)
    operand = operands(taus, weights)
    fused = run(*operand, steps=100, lr=1e-5)
    monkeypatch.setattr(adam, "_can_fuse", lambda theta, ws: False)
    plain = run(*operand, steps=100, lr=1e-5)
    assert relative(plain, fused) <= 1e-6
