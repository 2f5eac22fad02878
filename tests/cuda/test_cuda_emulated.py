"""The kernels of csrc/cuda in the emulator: what the shared table of cases (tests/ops) does not
ask. The table itself runs on the emulator in tests/ops/test_ops_bitwise.py."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from pymerge.errors import BackendError, PymergeError
from pymerge.formats import BF16, F32
from pymerge.ops import cuda, device, reference, view
from pymerge.ops.selection import Keep
from pymerge.ops.view import View


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_CUDA_EMULATE", "1")
    problem = cuda.why_not()
    if problem is not None:
        pytest.fail(problem)


def models(num: int, count: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, num).astype(np.float32) for _ in range(count)]


def halves(num: int, count: int) -> tuple[list[np.ndarray[Any, Any]], list[View]]:
    """bfloat16 models at 16-byte addresses, as the staged kernels want them."""
    arrays = []
    for values in models(num, count):
        memory = np.empty(num + 8, np.uint16)
        first = -memory.ctypes.data // 2 % 8
        memory[first : first + num] = (values.view(np.uint32) >> 16).astype(np.uint16)
        arrays.append(memory[first : first + num])
    return arrays, [view(array, BF16) for array in arrays]


@pytest.mark.parametrize("count", [1, 2, 5, 16, 33, 70])
@pytest.mark.parametrize("elect", ["weighted", "none"])
def test_staged_merge_for_any_number_of_models(count: int, elect: str) -> None:
    """Many models leave room for few threads of a block, then for tables outside the launch."""
    num = 3 * 128 * 8 * 3 + 5
    arrays, views = halves(num, count + 1)
    keeps = [Keep(0x3F000000 + i, num // 2) for i in range(count)]
    weights = [0.5 + 0.01 * i for i in range(count)]
    found, expected = np.zeros(num, np.float32), np.zeros(num, np.float32)
    for backend, out in ((cuda, found), (reference, expected)):
        backend.disjoint_merge(
            view(out), views[0], views[1:], weights, keeps, 7, elect=elect, combine="count"
        )
    assert found.tobytes() == expected.tobytes()
    assert len(arrays) == count + 1


@pytest.mark.parametrize("count", [3000, 100000])
def test_too_many_models_are_an_error_that_counts_them(count: int) -> None:
    (x,) = models(1, 1)
    out = np.zeros(1, np.float32)
    with pytest.raises(BackendError, match=r"axpy_n: .* models"):
        cuda.axpy_n(view(out), [view(x)] * count, [1.0] * count)


@pytest.mark.parametrize("shift", [0, 8, 14, 16, 20, 31])
def test_histogram_in_shared_memory_or_not(shift: int) -> None:
    """Bins that fit a block for all models, for some of them at a time, and for none."""
    if shift == 0:
        options: dict[str, Any] = {"prefix": [0x3F80] * 5, "prefix_shift": 16}
    else:
        options = {}
    num_bins = 2 ** (16 if shift == 0 else 31 - shift)
    arrays = models(30011, 5)
    views = [view(array) for array in arrays]
    found, expected = (np.ones((5, num_bins), np.uint64) for _ in range(2))
    cuda.magnitude_histogram(None, views, found, shift=shift, **options)
    reference.magnitude_histogram(None, views, expected, shift=shift, **options)
    assert np.array_equal(found, expected)
    assert expected.sum() > 5 * num_bins


@pytest.mark.parametrize("num", [16383, 16384, 16385, 3 * 16384 + 9])
def test_ties_and_candidates_across_segments(num: int) -> None:
    """The order of elements is kept where one segment ends and the next begins."""
    rng = np.random.default_rng(num)
    x = rng.choice(np.array([0.5, -1.0, 2.0, 3.0], np.float32), num)
    key = int(np.float32(1.0).view(np.int32))
    places = np.flatnonzero(x == -1.0)
    for nth in (0, 1, len(places) // 2, len(places) - 1):
        assert cuda.locate_equal(None, view(x), key, nth) == (places[nth], nth + 1)
    assert cuda.locate_equal(None, view(x), key, len(places)) == (-1, len(places))
    ends = [int(np.float32(v).view(np.int32)) for v in (0.5, 3.0)]
    counts, (keys,) = cuda.bracket_count(None, [view(x)], ends[:1], ends[1:], num)
    between = np.abs(x[(np.abs(x) > 0.5) & (np.abs(x) < 3)])
    assert keys.tobytes() == between.view(np.int32).tobytes()
    assert counts[0].tolist() == [0, *(int((x == v).sum()) for v in (3.0, 0.5)), len(between)]


def test_rows_too_long_for_shared_memory() -> None:
    columns = 40009
    rng = np.random.default_rng(1)
    x = rng.integers(0, 50, 2 * columns).astype(np.float32)
    found, expected = np.zeros_like(x), np.zeros_like(x)
    options: dict[str, Any] = {"columns": columns, "draws_low": 2**30, "draws_span": 2**31}
    for backend, out in ((cuda, found), (reference, expected)):
        backend.row_sparsify(view(out), None, view(x), 3, seed=9, rescale=True, **options)
    assert found.tobytes() == expected.tobytes()
    assert 0 < np.count_nonzero(found) < len(x)


def test_wrong_arguments_are_refused_by_the_binding_too() -> None:
    extension = cuda.runtime()
    x = models(8, 1)[0]
    out = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="expected 1 weights, found 2"):
        extension.axpy_n(view(out), None, [view(x)], [1.0, 2.0], 1.0, 1.0, True)
    with pytest.raises(ValueError, match="7 elements, expected 8"):
        extension.axpy_n(view(out), None, [view(x[:7])], [1.0], 1.0, 1.0, True)
    with pytest.raises(ValueError, match="cannot round to format code 4"):
        extension.axpy_n(View(out.ctypes.data, 4, 8), None, [view(x)], [1.0], 1.0, 1.0, True)
    with pytest.raises(PymergeError):
        cuda.axpy_n(view(out), [view(x)], [1.0, 2.0])


def test_a_stream_of_the_host_device_copies_and_runs_ops() -> None:
    (there,) = device.devices_for("cuda")
    assert device.memory_of("cuda") == "device"
    assert 0 < there.free_memory <= there.total_memory
    x = models(1000, 1)[0]
    out = np.zeros_like(x)
    source, target = there.buffer(x.nbytes), there.buffer(out.nbytes)
    assert source.ptr % 256 == 0
    there.register(x.ctypes.data, x.nbytes)
    with there.stream() as stream, there.stream() as other:
        stream.copy_in(source.ptr, x.ctypes.data, x.nbytes)
        other.wait_for(stream)
        assert device.current_place() == other.place
        cuda.axpy_n(
            View(target.ptr, F32.code or 0, 1000), [View(source.ptr, F32.code or 0, 1000)], [2.0]
        )
        other.copy_out(out.ctypes.data, target.ptr, out.nbytes)
        other.synchronize()
    there.unregister(x.ctypes.data, x.nbytes)
    assert np.array_equal(out, 2 * x)
    source.close()
    assert source.ptr == 0


def test_the_runtime_of_the_emulator() -> None:
    """The calls that a GPU's Device makes, on the one device that the emulator has."""
    runtime = cuda.runtime()
    there = device.CudaDevice(runtime, 0)
    x = models(100, 1)[0]
    back = np.zeros_like(x)
    memory = there.buffer(x.nbytes)
    stream, other = there.stream(), there.stream()
    stream.copy_in(memory.ptr, x.ctypes.data, x.nbytes)
    other.wait_for(stream)
    other.copy_out(back.ctypes.data, memory.ptr, x.nbytes)
    other.synchronize()
    assert back.tobytes() == x.tobytes()
    fresh = there.buffer(16)
    poisoned = ctypes.string_at(fresh.ptr, 16)
    assert poisoned == b"\xa5" * 16
    with pytest.raises(BackendError, match="device 0 only"):
        runtime.use((1, 0))


def test_backends_without_devices_are_named() -> None:
    assert device.memory_of("cpu") == "host"
    with pytest.raises(BackendError, match="backend cpu works on host memory"):
        device.devices_for("cpu")
