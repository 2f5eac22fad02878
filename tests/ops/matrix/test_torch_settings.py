"""What torch keeps for a thread or for the whole process is as it was, whoever computes beside."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from pymerge.ops.workspace import Workspace

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])
    # Contexts of one thread that end in the order in which they began leave its gradients off.
    torch.set_grad_enabled(True)


def in_new_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_one_blas_thread_inside_and_nowhere_else() -> None:
    """Neither in this thread afterwards, nor in one that first calls torch meanwhile or later."""
    torch.set_num_threads(3)
    with Workspace(2) as ws:
        with ws.active():
            assert torch.get_num_threads() == 1
            assert in_new_thread(torch.get_num_threads) == 3
            assert ws.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        assert torch.get_num_threads() == 3
        assert in_new_thread(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_workspaces_that_overlap_leave_the_threads() -> None:
    """The second one is made, by a thread that is new to torch, while the first computes."""
    torch.set_num_threads(3)
    with ExitStack() as stack:
        first = stack.enter_context(Workspace(2))
        with first.active():
            second = in_new_thread(lambda: Workspace(2))
        second.close()
    assert torch.get_num_threads() == 3
    assert in_new_thread(torch.get_num_threads) == 3


def test_full_precision_until_the_last_has_left() -> None:
    torch.set_float32_matmul_precision("medium")
    with Workspace() as ws:
        first, second = ws.active(), ws.active()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert precisions() <= {"ieee", "highest"}
        second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    assert not precisions() <= {"ieee", "highest"}


def precisions() -> set[str]:
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    found = {getattr(place, "fp32_precision", None) for place in places} - {None}
    return found or {torch.get_float32_matmul_precision()}


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"),
    reason="torch has torch.backends.fp32_precision since version 2.9",
)
def test_precision_set_by_the_newer_names() -> None:
    """Torch refuses to tell by the older name then; the setting stays what it was."""
    program = """
import torch
from pymerge.ops.workspace import Workspace
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
with Workspace() as ws, ws.active():
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
