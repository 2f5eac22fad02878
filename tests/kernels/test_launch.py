"""Launches from several threads, as the engine makes them."""

from __future__ import annotations

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pymerge.formats import BF16
from pymerge.ops.view import View

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

launch: Any = importlib.import_module("pymerge.kernels.launch")
elementwise: Any = importlib.import_module("pymerge.kernels.elementwise")


class Kernel:
    """Like Triton's compiled kernels: its launcher is there for all to see before its function."""

    def __init__(self) -> None:
        self.launcher: Callable[[str | None], None] | None = None
        self.function: str | None = None
        self.launched: list[str | None] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **constants: Any) -> None:
            if self.launcher is None:
                self.launcher = self.launched.append
                time.sleep(0.02)  # the driver loads the function, without the GIL
                self.function = "function"
            self.launcher(self.function)

        return run


def test_threads_launch_a_kernel_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel, start = Kernel(), threading.Barrier(4)

    def run(_: int) -> None:
        start.wait()
        launch.launch(kernel, (1,))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert kernel.launched == ["function"] * 4


class Room:
    """Notes what is done in it."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.append("leave")

    def finish(self) -> None:
        self._done.append("wait")

    def zeros(self, shape: Any, dtype: str) -> Any:
        return launch.Scratch(1 << 20, np.zeros(shape, dtype))


@pytest.mark.parametrize("op", [elementwise.TALL, elementwise.ELECT])
def test_masks_are_there_when_the_op_returns(op: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies them may use another stream."""
    done: list[str] = []
    monkeypatch.setattr(elementwise, "Room", lambda address: Room(done))
    monkeypatch.setattr(elementwise, "launch", lambda *given, **constants: done.append("launch"))
    assert BF16.code is not None
    base = View(1 << 20, BF16.code, 64)
    elementwise.write_masks(op, [1 << 21], base, [View(1 << 22, BF16.code, 64)], [0.5])
    assert done == ["launch", "wait", "leave"]
