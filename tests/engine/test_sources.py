"""Inputs that change, that hold bad numbers or odd formats; what a run tells while it lasts."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymerge import _C, api
from pymerge.engine import context
from pymerge.engine.events import STAGES
from pymerge.engine.sources import Sources
from pymerge.errors import PymergeError, StorageError
from pymerge.plan import memory

Model = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    """Whatever happens in a merge, its threads end with it."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("pymerge")] == []


@pytest.fixture
def copied(small: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe over private copies of two models, which a test may change."""
    models = []
    for path in small.tuned:
        shutil.copytree(path, tmp_path / "models" / path.name)
        models.append({"model": str(tmp_path / "models" / path.name)})
        models[-1]["parameters"] = {"weight": 0.5}
    return {"merge_method": "linear", "models": models}


def last_file(recipe: dict[str, Any]) -> Path:
    return Path(recipe["models"][1]["model"]) / "model-00002-of-00002.safetensors"


def during_the_merge(patch: pytest.MonkeyPatch, nth: int, change: Callable[[], None]) -> None:
    real, left = Sources.read, [nth]

    def read(self: Sources, *args: Any) -> int:
        left[0] -= 1
        if left[0] == 0:
            change()
        return real(self, *args)

    patch.setattr(Sources, "read", read)


@pytest.mark.parametrize("method", ["dontcache", "direct", "buffered", "plain"])
def test_source_cut_short(
    copied: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    path = last_file(copied)
    during_the_merge(monkeypatch, 2, lambda: os.truncate(path, path.stat().st_size // 2))
    with pytest.raises(StorageError, match=r"reading tensor '.*the file was cut short") as raised:
        api.merge(copied, tmp_path / "out", read_method=method, threads=1)
    assert path.name in str(raised.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\2")


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewritten, "changed during the merge"),
        (replaced, "changed during the merge"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "changed during the merge"),
        (lambda path: path.unlink(), "vanished during the merge|reading tensor"),
    ],
    ids=["rewritten", "replaced", "longer", "deleted"],
)
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"], ids=["single", "multi"])
def test_source_changed(
    copied: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    words: str,
    shard_size: str,
) -> None:
    during_the_merge(monkeypatch, 8, lambda: change(last_file(copied)))
    with pytest.raises(StorageError, match=words):
        api.merge(copied, tmp_path / "out", shard_size=shard_size, threads=1)
    for mark in ("model.safetensors", "model.safetensors.index.json"):
        assert not (tmp_path / "out" / mark).exists()


def test_device_error_while_reading(
    copied: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any
) -> None:
    def fail() -> None:
        raise StorageError("reading failed")

    with monkeypatch.context() as patch:
        during_the_merge(patch, 7, fail)
        with pytest.raises(StorageError, match="reading failed"):
            api.merge(copied, tmp_path / "out", threads=1)
    api.merge(copied, tmp_path / "out")
    api.merge(copied, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_every_block_comes_back_after_a_failure(
    large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    class Pool(context.BlockPool):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            pools.append(self)

    monkeypatch.setattr(context, "BlockPool", Pool)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", (16 << 10) + 8192)
    for nth, method in enumerate(("linear", "ties", "ties", "passthrough"), start=3):

        def fail(method: str = method) -> None:
            raise OSError(errno.EIO, f"broken {method}")

        with monkeypatch.context() as patch:
            during_the_merge(patch, nth * 7, fail)
            with pytest.raises(OSError, match=f"broken {method}"):
                api.merge(large.recipe(method), tmp_path / f"out{nth}", memory="160MiB")
    assert len(pools) == 4
    assert [pool.num_free for pool in pools] == [pool.num_blocks for pool in pools]


def test_failure_of_a_kernel_is_not_lost(
    large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing tile of one lane among tiles that merely stop."""
    plan = api.plan(large.recipe("linear"), threads=2)
    real, calls = plan.ops._functions["axpy_n"], []

    def axpy_n(*args: Any, **names: Any) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("a kernel failed")
        return int(real(*args, **names))

    monkeypatch.setitem(plan.ops._functions, "axpy_n", axpy_n)
    with pytest.raises(FloatingPointError, match="a kernel failed"):
        api.merge(plan, tmp_path / "out")


@pytest.fixture
def bad(save: Any, as_bf16: Any, tmp_path: Path) -> dict[str, Any]:
    """Two models, one of them with two NaN, an infinity and numbers that overflow when added."""
    shapes = {"good.weight": (40, 40), "nan.weight": (300,), "inf.weight": (30, 7)}
    rng = np.random.default_rng(1)
    first = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    second = {name: array.copy() for name, array in first.items()}
    first["nan.weight"][[0, 299]] = math.nan
    first["inf.weight"][3, 2] = -math.inf
    models = [
        {
            "model": str(save(tmp_path / name, {key: as_bf16(a) for key, a in arrays.items()})),
            "parameters": {"weight": 1.0},
        }
        for name, arrays in (("first", first), ("second", second))
    ]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16"}


def test_nonfinite_elements_are_counted(bad: dict[str, Any], tmp_path: Path) -> None:
    report = api.merge(bad, tmp_path / "out")
    assert report.nonfinite == {"inf.weight": 1, "nan.weight": 2}
    manifest = json.loads((tmp_path / "out" / "pymerge_manifest.json").read_text())
    assert manifest["nonfinite"] == {"inf.weight": 1, "nan.weight": 2}


def test_nonfinite_elements_of_copies_are_counted(bad: dict[str, Any], tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": bad["models"][0]["model"]}]}
    assert api.merge(recipe, tmp_path / "out").nonfinite == {"inf.weight": 1, "nan.weight": 2}


@pytest.mark.parametrize("shard_size", ["1GB", "1KB"], ids=["single", "multi"])
def test_nonfinite_fail_leaves_no_model(
    bad: dict[str, Any], tmp_path: Path, digests: Any, shard_size: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(PymergeError, match=r"2 tensors .*inf.weight \(1\), nan.weight \(2\)"):
        api.merge(bad, out, non_finite="fail", shard_size=shard_size)
    assert not (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()
    report = api.merge(bad, out, shard_size=shard_size)
    assert report.bytes_read == 0
    assert report.nonfinite == {"inf.weight": 1, "nan.weight": 2}
    api.merge(bad, tmp_path / "whole", shard_size=shard_size)
    assert digests(out) == digests(tmp_path / "whole")


def test_nonfinite_option_of_the_command(
    bad: dict[str, Any], tmp_path: Path, write_recipe: Any, command: Any
) -> None:
    recipe = write_recipe(tmp_path / "bad.yml", bad)
    code, printed = command("merge", recipe, tmp_path / "failed", "--non-finite", "fail")
    assert code == 2
    assert "nan.weight (2)" in printed
    assert not (tmp_path / "failed" / "model.safetensors").exists()
    code, printed = command("merge", recipe, tmp_path / "out")
    assert code == 0
    assert "nan.weight: 2 non-finite elements" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_trace_and_progress(large: Any, tmp_path: Path) -> None:
    shown: list[Any] = []

    def show(snapshot: Any) -> None:
        shown.append(snapshot)

    plan = api.plan(large.recipe("ties"), threads=2)
    report = api.merge(plan, tmp_path / "out", trace=tmp_path / "trace.json", progress=show)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == set(STAGES)
    work = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in work)
    assert {(event["name"], event["cat"]) for event in work} == {
        (job.name, stage) for job in plan.jobs for stage in names - {"solve"}
    }
    seconds = sum(event["dur"] for event in work) / 1e6
    assert seconds == pytest.approx(sum(report.stage_seconds.values()), rel=0.05, abs=0.01)
    for before, after in itertools.pairwise(shown):
        assert before.bytes_read <= after.bytes_read
        assert before.bytes_written <= after.bytes_written
        assert before.tensors_done <= after.tensors_done
        assert before.seconds <= after.seconds
    last = shown[-1]
    assert last.bytes_read == last.bytes_read_total == report.bytes_read
    assert last.bytes_written == last.bytes_written_total == report.bytes_written
    assert last.tensors_done == last.tensors_total == len(plan.jobs)


def test_trace_that_cannot_be_written_is_told_at_once(small: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write the trace"):
        api.merge(small.recipe("linear"), tmp_path / "out", trace=tmp_path / "no" / "trace.json")
    assert not (tmp_path / "out").exists()


def test_failing_display_stops_the_merge(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(snapshot: Any) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        api.merge(small.recipe("linear"), tmp_path / "out", progress=show)
    api.merge(small.recipe("linear"), tmp_path / "out")
    api.merge(small.recipe("linear"), tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_model_merged_with_itself_is_read_once(small: Any, tmp_path: Path) -> None:
    folder = str(small.base)
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in (folder, folder + "/.")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    report = api.merge(recipe, tmp_path / "out")
    assert report.bytes_read == report.bytes_written


def test_more_models_than_compute_slots(
    small: Any, tmp_path: Path, save: Any, as_bf16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty inputs, one thread, an arena that holds a few tiles."""
    array = np.arange(20_000, dtype=np.float32)
    models = [
        {
            "model": str(save(tmp_path / str(number), {"w": as_bf16(array * number)})),
            "parameters": {"weight": 1.0, "density": 0.5},
        }
        for number in range(40)
    ]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    ties = {**recipe, "merge_method": "ties", "base_model": models.pop(0)["model"]}
    for name, each in (("linear", recipe), ("ties", ties)):
        whole = api.merge(each, tmp_path / f"whole-{name}")
        with monkeypatch.context() as patch:
            patch.setattr(memory, "SMALLEST_BLOCK", 4096)
            patch.setattr(memory, "SMALLEST_ARENA", 1)
            patch.setattr(memory, "OVERHEAD_BYTES", 0)
            patch.setattr(memory, "SELECTION_SHARE", 1 << 60)
            patch.setattr(memory, "TABLE_BYTES", 0)
            report = api.merge(each, tmp_path / name, memory=12288 * 41 * 4, threads=1)
        assert report.nonfinite == whole.nonfinite
        found = [
            (folder / "model.safetensors").read_bytes()
            for folder in (tmp_path / name, tmp_path / f"whole-{name}")
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_tensor_as_large_as_the_arena(
    small: Any, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """The largest tensor takes all blocks, all but one, or one too many and is streamed."""
    plan = api.plan(small.recipe("ties"), threads=1)
    api.merge(plan, tmp_path / "whole")
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 4096 + 8192)
    for name, value in (("SMALLEST_BLOCK", 1), ("SMALLEST_ARENA", 1), ("OVERHEAD_BYTES", 0)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "SELECTION_SHARE", 1 << 60)
    monkeypatch.setattr(memory, "TABLE_BYTES", 0)
    wanted = api.plan(small.recipe("ties"), memory="8MiB", threads=1)
    largest = max(wanted.tiling.resident_blocks(job) for job in wanted.jobs)
    plan = api.plan(small.recipe("ties"), memory=(largest + spare) * 12288, threads=1)
    assert plan.tiling.num_blocks == largest + spare
    resident = [plan.tiling.is_resident(job) for job in plan.jobs]
    assert all(resident) == (spare >= 0)
    api.merge(plan, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


FORMATS = {
    "float": ("F32", (7, 11), 4 * 77),
    "int64": ("I64", (5,), 40),
    "bool": ("BOOL", (3, 3), 9),
    "uint8": ("U8", (10_001,), 10_001),
    "four_bits": ("F4", (101, 20), 1010),
    "six_bits": ("F6_E2M3", (4, 16), 48),
    "complex": ("C64", (9,), 72),
    "scale": ("F8_E8M0", (33,), 33),
    "scalar": ("F32", (), 4),
    "int_scalar": ("I64", (), 8),
    "empty": ("F32", (0, 8), 0),
    "empty_int": ("I32", (0,), 0),
    "unit": ("F16", (1,), 2),
}


def odd_model(seed: int, raw: Any) -> Model:
    rng = np.random.default_rng(seed)
    found = {}
    for name, (format, shape, num_bytes) in FORMATS.items():
        if format == "F32":
            data = rng.normal(size=shape).astype(np.float32).tobytes()
        elif format == "F16":
            data = rng.normal(size=shape).astype(np.float16).tobytes()
        else:
            data = rng.integers(0, 2, num_bytes, np.uint8).tobytes()
        found[name] = raw(format, shape, data)
    return found


def read_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], content[begin:end])
    return found


@pytest.mark.parametrize("block_bytes", [1 << 20, 22], ids=["whole", "tiles"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 1], ids=["single", "multi"])
@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "ties-model", "passthrough"]
)
def test_odd_tensors(
    tmp_path: Path,
    save: Any,
    raw: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    shard_bytes: int,
    block_bytes: int,
) -> None:
    """No elements, no dimensions, no floats, less than a byte an element; shards without data."""
    base = save(tmp_path / "base", odd_model(0, raw))
    tuned = save(tmp_path / "tuned", odd_model(1, raw))
    name = method.removesuffix("-model")
    models = [{"model": str(tuned), "parameters": {"weight": 1.0, "density": 0.5}}]
    recipe: dict[str, Any] = {"merge_method": name, "models": models}
    if method == "passthrough":
        models[0]["parameters"] = {}
    elif method == "linear":
        recipe["models"] = [{"model": str(base), "parameters": {"weight": 0.0}}, *models]
    else:
        recipe["base_model"] = str(base)
    if method == "ties-model":
        recipe["parameters"] = {"trim_scope": "model"}
    if block_bytes < 100:
        monkeypatch.setattr(memory, "LARGEST_BLOCK", block_bytes + 8192)
        monkeypatch.setattr(memory, "SMALLEST_BLOCK", 1)
        monkeypatch.setattr(memory, "PAGE", 2)
    api.merge(recipe, tmp_path / "out", shard_size=shard_bytes)
    found = read_tensors(tmp_path / "out")
    expected = read_tensors(tuned if method == "passthrough" else base)
    for key, (format, shape, _) in FORMATS.items():
        assert found[key][:2] == (format, list(shape)), key
        if format not in ("F32", "F16"):
            assert found[key][2] == expected[key][2], key
    changed = read_tensors(tuned)
    if method in ("linear", "passthrough"):
        assert found["float"] == changed["float"]
        assert found["scalar"] == changed["scalar"]
    if method == "task_arithmetic":
        before, after, got = (
            np.frombuffer(each["float"][2], np.float32)
            for each in (read_tensors(base), changed, found)
        )
        np.testing.assert_array_equal(got, before + (after - before))
    assert not api.verify(tmp_path / "out").problems


@pytest.mark.parametrize("format", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_inputs(tmp_path: Path, save: Any, raw: Any, format: str) -> None:
    """Every value of the format, read exactly."""
    data = bytes(range(256))
    folders = [save(tmp_path / name, {"w": raw(format, (256,), data)}) for name in ("a", "b")]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    report = api.merge(recipe, tmp_path / "out")
    names = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    expected = torch.tensor(list(data), dtype=torch.uint8).view(names[format]).float().numpy()
    found = np.frombuffer(read_tensors(tmp_path / "out")["w"][2], np.float32)
    np.testing.assert_array_equal(found, expected)
    assert report.nonfinite == {"w": int(np.count_nonzero(~np.isfinite(expected)))}


def test_model_of_empty_tensors(tmp_path: Path, save: Any, raw: Any) -> None:
    folders = [
        save(tmp_path / name, {"w": raw("F32", (0,), b""), "v": raw("F32", (3, 0), b"")})
        for name in ("a", "b")
    ]
    models = [{"model": str(folders[1]), "parameters": {"weight": 1.0, "density": 0.5}}]
    for scope in ("tensor", "model"):
        recipe = {
            "merge_method": "ties",
            "base_model": str(folders[0]),
            "models": models,
            "parameters": {"trim_scope": scope},
        }
        api.merge(recipe, tmp_path / scope)
        assert read_tensors(tmp_path / scope)["v"] == ("F32", [3, 0], b"")


def test_arena_that_cannot_be_reserved(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arena(num_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "reserving memory")

    monkeypatch.setattr(_C, "Arena", arena)
    with pytest.raises(PymergeError, match="memory"):
        api.merge(small.recipe("linear"), tmp_path / "out")
