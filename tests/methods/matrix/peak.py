"""What a method's matrices hold at once, counted by storages, beside what its cost states."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pymerge
from pymerge.methods import get_method
from pymerge.methods.protocol import Tensor
from pymerge.ops.opset import choose_ops
from pymerge.ops.workspace import Workspace
from pymerge.plan.memory import PANEL_BYTES


class Tally:
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._known or not storage.nbytes():
                return
            self._known.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.now -= size


class Watch(TorchDispatchMode):
    """Shows a tally every tensor that an operation of this thread makes."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self._tally.see(each)
        return result


@contextmanager
def watched() -> Iterator[Tally]:
    """Count what every workspace makes, in all its threads."""
    tally = Tally()
    active, mapped, made = Workspace.active, Workspace.map, Workspace.empty

    @contextmanager
    def watching(self: Workspace) -> Iterator[None]:
        with active(self), Watch(tally):
            yield

    def mapping(self: Workspace, task: Any, items: Any) -> list[Any]:
        def run(item: Any) -> Any:
            with Watch(tally):
                return task(item)

        return mapped(self, run, items)

    def making(self: Workspace, *shape: int, dtype: str = "float32") -> torch.Tensor:
        tensor = made(self, *shape, dtype=dtype)
        tally.see(tensor)
        return tensor

    Workspace.active, Workspace.map, Workspace.empty = watching, mapping, making  # type: ignore
    try:
        yield tally
    finally:
        Workspace.active, Workspace.map, Workspace.empty = active, mapped, made  # type: ignore


def stated_and_measured(
    method: str, shape: tuple[int, ...], num_models: int, *, threads: int = 2, **parameters: Any
) -> tuple[int, int]:
    """(bytes that the plan reserves, the cost and the panels of the threads; bytes that were alive
    at once) of one dense merge in memory."""
    torch.manual_seed(0)
    base = 0.02 * torch.randn(shape)
    models = [base + 1e-3 * torch.randn(shape) for _ in range(num_models)]
    entry = get_method(method)
    shared = {
        name: parameters.get(name, entry.spec.default(name, parameters.get("preset")))
        for name, spec in entry.spec.parameters.items()
        if spec.scope == "shared"
    }
    own = {
        name: parameters.get(name, spec.default)
        for name, spec in entry.spec.parameters.items()
        if spec.scope == "model"
    }
    has_base = entry.spec.base != "input"
    tensor = Tensor(
        "tensor", shape, num_models, has_base, shared, [own] * num_models, choose_ops(entry.ops)
    )
    assert entry.cost is not None
    with watched() as tally:
        pymerge.merge_tensor(method, base, models, threads=threads, **parameters)
    return entry.cost(tensor).num_bytes + threads * PANEL_BYTES * max(shape), tally.peak
