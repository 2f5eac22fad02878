"""The workspace: results do not depend on its threads, and errors come through."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from spectra import conditioned, gaussian, integers

from pymerge.ops.matrix import (
    gram,
    gram_acc,
    gram_eigh,
    inverse_sqrt,
    polar,
    svt,
    truncated_svd,
)
from pymerge.ops.workspace import PANEL, Workspace

torch = pytest.importorskip("torch")


def accumulated(x, ws):
    total = torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64)
    gram_acc(total, x, ws, side="rows", base=x.roll(1, 0))
    return total


def wide_gram(x, ws):
    return gram(x, ws, side="rows")


OPS = {
    "gram-columns": lambda x, ws: gram(x, ws, side="columns"),
    "gram-rows": wide_gram,
    "gram-float32": lambda x, ws: gram(x, ws, side="columns", dtype="float32"),
    "gram_acc": accumulated,
    "gram_eigh": lambda x, ws: gram_eigh(wide_gram(x, ws), ws),
    "inverse_sqrt": lambda x, ws: inverse_sqrt(wide_gram(x, ws), ws),
    "truncated_svd": lambda x, ws: truncated_svd(x, 40, ws),
    "truncated_svd-float32": lambda x, ws: truncated_svd(x, 40, ws, dtype="float32"),
    "randomized": lambda x, ws: truncated_svd(x, 20, ws, route="randomized"),
    "svt": lambda x, ws: svt(x, 0.5, ws),
    "polar": lambda x, ws: polar(x, ws),
    "polar-gram": lambda x, ws: polar(x, ws, route="gram"),
    "polar-qdwh": lambda x, ws: polar(x, ws, route="qdwh"),
    "polar-iterate": lambda x, ws: polar(x, ws, route="iterate"),
}
INPUTS = {
    "square": gaussian(530, 530),
    "tall": gaussian(1100, 280),
    "wide": conditioned(270, 540, 1e4),
    "deficient": integers(300, 290, 30),
}


def bits(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [p.numpy().tobytes() if isinstance(p, torch.Tensor) else float(p).hex() for p in parts]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())
def test_threads_do_not_change_a_bit(x, op):
    results = []
    for threads in (1, 2, 5):
        with Workspace(threads) as ws, ws.active():
            results.append(bits(op(torch.from_numpy(x), ws)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("op", [OPS["polar"], OPS["truncated_svd"]], ids=["polar", "svd"])
def test_a_worker_gives_what_the_caller_gives(op):
    """Callers share out whole matrices, too; what those map runs where it is."""
    x = torch.from_numpy(INPUTS["square"])
    with Workspace(2) as ws, ws.active():
        alone = bits(op(x, ws))
        shared = ws.map(lambda part: bits(op(part, ws)), [x, x, x])
    assert shared == [alone] * 3


def test_map_keeps_the_order_and_uses_the_workers():
    with Workspace(3) as ws, ws.active():
        both = threading.Barrier(3, timeout=20)

        def task(number):
            both.wait()
            return number, torch.get_num_threads()

        found = ws.map(task, range(3))
    assert found == [(0, 1), (1, 1), (2, 1)]


def test_a_failing_task_and_a_check_come_through():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with Workspace(2, check=stop) as ws, ws.active(), pytest.raises(Stop):
        polar(torch.from_numpy(INPUTS["square"]), ws)
    with Workspace(2) as ws, ws.active(), pytest.raises(ZeroDivisionError):
        ws.map(lambda n: 1 // n, [1, 0, 2])


def test_panels_cover_each_row_once():
    with Workspace(2) as ws:
        for num in (0, 1, PANEL, PANEL + 1, 1000):
            rows = [row for panel in ws.panels(num) for row in range(num)[panel]]
            assert rows == list(range(num))
        assert ws.panels(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_matmul_is_the_product():
    left, right = gaussian(600, 70), gaussian(70, 90)
    with Workspace(2) as ws, ws.active():
        found = ws.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    exact = left.astype(np.float64) @ right
    assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(exact)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with Workspace(2) as ws:
        with ws.active():
            assert torch.get_num_threads() == 1
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == before
        assert torch.is_grad_enabled()
    assert torch.get_num_threads() == before
