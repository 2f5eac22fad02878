"""Tensors in a device's memory, by the emulator of the cuda backend: no copies, the same bytes."""

from __future__ import annotations

import importlib.util

import pytest

import pymerge
from pymerge.in_memory import planned
from pymerge.ops.executor import DeviceExecutor, ResidentExecutor, make_resident_executor
from pymerge.ops.opset import choose_ops

METHODS = ("ties", "task_arithmetic", "dare_ties", "slerp", "karcher", "della", "pcb", "iso_c")


@pytest.fixture
def emulated(monkeypatch):
    if importlib.util.find_spec("pymerge._cuda_emulated") is None:
        pytest.skip("the emulator of the cuda backend is not built")
    monkeypatch.setenv("PYMERGE_CUDA_EMULATE", "1")


@pytest.mark.parametrize("method", METHODS)
def test_a_device_gives_the_bytes_of_the_host(
    method, nets, cases, emulated, monkeypatch, assert_same_bytes
):
    case = next(case for case in cases if case.method == method)
    base = nets.base if case.takes_base else None
    models = nets.models[: case.num_models]
    given = case.call(nets)
    expected = pymerge.merge_state_dicts(base, models, backend="cpu", **given)
    # The emulated device's memory is the host's, under torch's name cpu.
    monkeypatch.setattr(planned, "make_executor", lambda ops, _: make_resident_executor(ops, "cpu"))
    copied = []
    monkeypatch.setattr(DeviceExecutor, "here", lambda *args, **_: copied.append(args))
    assert_same_bytes(pymerge.merge_state_dicts(base, models, backend="cuda", **given), expected)
    with pymerge.Session(base, models, backend="cuda", **given) as session:
        assert isinstance(session._planned.executor, ResidentExecutor)
        for _ in range(2):
            assert_same_bytes(session.merge(), expected)
    assert not copied


def test_ops_that_do_not_work_there_are_an_error():
    ops = choose_ops(["axpy_n"], asked="cpu")
    with pytest.raises(pymerge.BackendError, match=r"tensors are on cuda:0, the ops .* run on cpu"):
        make_resident_executor(ops, "cuda:0")
