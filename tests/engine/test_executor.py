"""Tiles through devices: the same bytes, only device memory reaches the ops, nothing is left
behind."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pymerge import api
from pymerge.engine.matrices import Matrices
from pymerge.errors import BackendError, PlanError
from pymerge.formats import BY_CODE
from pymerge.ops import cpu, cuda, device, executor
from pymerge.ops.opset import OpSet
from pymerge.ops.table import OPS
from pymerge.ops.view import View


class Memory:
    """A piece of a device's memory, between its allocation and its end."""

    def __init__(self, owner: FakeDevice, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._owner = owner
        self._bytes = (ctypes.c_char * num_bytes).from_buffer_copy(b"\xff" * num_bytes)
        self.ptr = ctypes.addressof(self._bytes)
        owner.pieces[self.ptr] = num_bytes

    def __del__(self) -> None:
        self._owner.pieces.pop(self.ptr, None)


class Stream:
    """Copies at once; counts what moves and knows whether it is current."""

    def __init__(self, owner: FakeDevice) -> None:
        self._owner = owner
        self._pending = False

    def copy_in(self, target: int, source: int, num_bytes: int) -> None:
        assert self._owner.holds(target, num_bytes)
        assert self._owner.is_pinned(source)
        ctypes.memmove(target, source, num_bytes)
        self._owner.bytes_in += num_bytes

    def copy_out(self, target: int, source: int, num_bytes: int) -> None:
        assert self._owner.holds(source, num_bytes)
        assert self._owner.is_pinned(target)
        ctypes.memmove(target, source, num_bytes)
        self._pending = True

    def synchronize(self) -> None:
        self._pending = False

    def __enter__(self) -> Stream:
        self._owner.current.stream = self
        return self

    def __exit__(self, *error: object) -> None:
        assert error[0] is not None or not self._pending, "output used before it was there"
        self._owner.current.stream = None


class FakeDevice:
    """Memory apart from the host's, of which the ops may touch nothing else."""

    current = threading.local()
    name, index, total_memory = "pretended", 0, 1 << 40

    def __init__(self, torch_name: str = "cpu:0") -> None:
        self.torch_name = torch_name
        self.pieces: dict[int, int] = {}
        self.pinned: list[tuple[int, int]] = []
        self.bytes_in = 0

    def buffer(self, num_bytes: int) -> Memory:
        return Memory(self, num_bytes)

    def stream(self) -> Stream:
        return Stream(self)

    def register(self, ptr: int, num_bytes: int) -> None:
        for each in DEVICES:
            each.pinned.append((ptr, num_bytes))

    def unregister(self, ptr: int, num_bytes: int) -> None:
        for each in DEVICES:
            each.pinned.remove((ptr, num_bytes))

    def holds(self, ptr: int, num_bytes: int) -> bool:
        return any(a <= ptr and ptr + num_bytes <= a + n for a, n in list(self.pieces.items()))

    def is_pinned(self, ptr: int) -> bool:
        return any(a <= ptr < a + n for a, n in self.pinned)


DEVICES: list[FakeDevice] = []
#: Ops that take addresses of masks.
MASKED = ("tall_masks", "elect_masks", "masked_sums")


@contextmanager
def guarded_ops(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's ops, which refuse what is not in the memory of a device whose stream is current."""

    def guard(op: str) -> Callable[..., Any]:
        run = getattr(cpu, op)

        def guarded(*args: Any, **options: Any) -> Any:
            assert getattr(FakeDevice.current, "stream", None) is not None, f"{op}: no stream"
            masks = args[1 if op == "masked_sums" else 0] if op in MASKED else ()
            there = [args[3]] if op == "apply_task" else list(masks)
            for mask in there:
                assert any(d.holds(mask, 1) for d in DEVICES), f"{op}: a mask at {mask}"
            for each in [*args, *options.values()]:
                for view in each if type(each) in (list, tuple) else [each]:
                    if isinstance(view, View) and view.num:
                        size = view.num * BY_CODE[view.code].num_bytes
                        assert any(d.holds(view.ptr, size) for d in DEVICES), f"{op}: {view}"
            return run(*args, **options)

        return guarded

    for op in OPS:
        patch.setattr(cpu, op, guard(op))
    yield


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    DEVICES[:] = [FakeDevice(f"cpu:{index}") for index in range(request.param)]
    monkeypatch.setattr(device, "memory_of", lambda backend: "device")
    monkeypatch.setattr(device, "devices_for", lambda backend: DEVICES)
    return DEVICES


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "passthrough", "emr"])
@pytest.mark.parametrize("memory", ["128MiB", "1GiB"])
def test_same_bytes_through_devices(
    large: Any,
    tmp_path: Any,
    digests: Any,
    devices: list[FakeDevice],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    memory: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(device, "memory_of", lambda backend: "host")
        api.merge(large.recipe(method), tmp_path / "host")
    with guarded_ops(monkeypatch):
        api.merge({**large.recipe(method)}, tmp_path / "device", memory=memory)
    assert digests(tmp_path / "device") == digests(tmp_path / "host")
    assert sum(each.bytes_in for each in devices) > 0
    for each in devices:
        assert not each.pieces, "device memory is given back"
        assert not each.pinned, "the arena is unpinned"


@pytest.mark.parametrize("count", [1, 2])
def test_matrices_are_computed_on_the_devices(
    small: Any,
    tmp_path: Any,
    digests: Any,
    devices: list[FakeDevice],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """A job has one device to itself: its tiles pass through that one alone."""
    recipe = {
        "merge_method": "iso_c",
        "base_model": str(small.base),
        "models": [{"model": str(path)} for path in small.tuned[:count]],
        "dtype": "float32",
    }
    with monkeypatch.context() as patch:
        patch.setattr(device, "memory_of", lambda backend: "host")
        api.merge(recipe, tmp_path / "host")
    used: dict[str, set[str]] = {}
    hold = Matrices.hold

    @contextmanager
    def held(self: Matrices, job: Any) -> Iterator[Any]:
        with hold(self, job) as workspace:
            if workspace is not None:
                used.setdefault(workspace.name, set()).add(job.name)
            yield workspace

    monkeypatch.setattr(Matrices, "hold", held)
    api.merge(dict(recipe), tmp_path / "device")
    found, expected = digests(tmp_path / "device"), digests(tmp_path / "host")
    name = "pymerge_manifest.json"  # the plan's hash tells where matrices are computed
    assert found.pop(name) != expected.pop(name)
    assert found == expected
    assert set(used) == {each.torch_name for each in devices}
    devices[0].__class__.total_memory = 1 << 10
    try:
        with pytest.raises(PlanError, match=r"the matrices of tensor .* has 1 KiB; give --backend"):
            api.plan(dict(recipe))
    finally:
        devices[0].__class__.total_memory = 1 << 40


def test_no_device_is_an_error(large: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_of", lambda backend: "device")
    monkeypatch.setattr(device, "devices_for", lambda backend: [])
    with pytest.raises(BackendError, match="expected a device"):
        api.merge(large.recipe("linear"), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_places_do_not_overlap() -> None:
    DEVICES[:] = [FakeDevice()]
    slot = executor._Slot(DEVICES[0])
    views = [View(1, 0, 3), View(2, 1, 5), View(3, 3, 0), View(4, 4, 1000)]
    places = slot.place(views)
    ends = [p.ptr + p.num * BY_CODE[p.code].num_bytes for p in places]
    assert all(place.ptr % 16 == places[0].ptr % 16 for place in places)
    assert all(end <= after.ptr for end, after in zip(ends, places[1:], strict=False))
    first = places[0].ptr
    assert slot.place(views[:2])[0].ptr == first, "memory is kept"


def test_no_copy_is_under_way_after_a_failure() -> None:
    """The host memory of a tile is given back whatever happened to it."""
    DEVICES[:] = [FakeDevice()]
    waited: list[str] = []

    class Slow(Stream):
        def copy_in(self, target: int, source: int, num_bytes: int) -> None:
            waited.append("copy")

        def synchronize(self) -> None:
            waited.append("wait")

    DEVICES[0].stream = lambda: Slow(DEVICES[0])  # type: ignore[method-assign]
    through = executor.DeviceExecutor(OpSet({}, {}, {}), DEVICES)
    with pytest.raises(ValueError, match="by the op"), through.here([View(64, 0, 4)]):
        raise ValueError("by the op")
    assert waited == ["copy", "wait"]
    through.close()


def test_memory_that_cannot_be_pinned_is_said_with_what_to_do() -> None:
    DEVICES[:] = [FakeDevice()]

    def refuse(ptr: int, num_bytes: int) -> None:
        raise BackendError(f"cudaHostRegister of {num_bytes} bytes: out of memory")

    DEVICES[0].register = refuse  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"of 4096 bytes: out of memory; .*smaller --memory"):
        executor.DeviceExecutor(OpSet({}, {}, {}), DEVICES, (1 << 20, 4096))


def test_older_devices_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may hold an old device beside one that the kernels run on."""

    class Runtime:
        capabilities = ((9, 0), (7, 5), (8, 0))

        def num_devices(self) -> int:
            return len(self.capabilities)

        def device_info(self, index: int) -> dict[str, Any]:
            return {"name": f"GPU {index}", "capability": self.capabilities[index]}

    monkeypatch.delenv("PYMERGE_CUDA_EMULATE", raising=False)
    monkeypatch.setattr(cuda, "runtime", Runtime)
    assert [each.index for each in device.devices_for("cuda")] == [0, 2]
