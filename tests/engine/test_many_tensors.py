"""The work of a merge grows with the number of its tensors and not faster; small ones are written
together. Work is counted, not timed."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymerge import _C, api
from pymerge.engine import context
from pymerge.engine.batch import BATCH_BYTES

COUNTS = (150, 300, 600)


def recipe(folder: Path, save: Any, as_bf16: Any, count: int) -> dict[str, Any]:
    """TIES of two models of small matrices, named as experts of layers."""
    random = np.random.default_rng(count)
    paths = []
    for name in ("base", "one", "two"):
        tensors = {
            f"model.layers.{i // 50}.mlp.experts.{i % 50}.up_proj.weight": as_bf16(
                random.standard_normal((8, 16))
            )
            for i in range(count)
        }
        paths.append(save(folder / str(count) / name, tensors))
    models = [{"model": str(p), "parameters": {"weight": 0.5, "density": 0.5}} for p in paths[1:]]
    return {"merge_method": "ties", "base_model": str(paths[0]), "models": models}


def calls_of(work: Any) -> int:
    """How many Python functions a piece of work calls, in all threads."""
    counts: dict[int, int] = {}

    def count(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            thread = threading.get_ident()
            counts[thread] = counts.get(thread, 0) + 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sum(counts.values())


def assert_linear(few: int, some: int, many: int) -> None:
    """From n to 2n to 4n the work grows by w and by 2w; a quadratic part would make that 4w."""
    assert many - some <= 2.3 * (some - few), (few, some, many)


def test_planning_is_linear(tmp_path: Path, save: Any, as_bf16: Any) -> None:
    recipes = [recipe(tmp_path, save, as_bf16, count) for count in COUNTS]
    api.plan(recipes[0])  # imports
    assert_linear(*(calls_of(lambda each=each: api.plan(each).hash) for each in recipes))


def test_merging_is_linear(tmp_path: Path, save: Any, as_bf16: Any) -> None:
    plans = [api.plan(recipe(tmp_path, save, as_bf16, count)) for count in COUNTS]
    api.merge(plans[0], tmp_path / "warm")
    assert_linear(
        *(
            calls_of(lambda plan=plan: api.merge(plan, tmp_path / f"out{len(plan.jobs)}"))
            for plan in plans
        )
    )


def test_small_tensors_are_written_and_journalled_together(
    tmp_path: Path, save: Any, as_bf16: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(recipe(tmp_path, save, as_bf16, COUNTS[-1]))
    writes, lines = [], []
    real = os.write

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def write(self, offset: int, address: int, length: int) -> None:
            writes.append(length)
            super().write(offset, address, length)

    def write(fd: int, data: bytes) -> int:
        lines.append(data.count(b'"tensor"'))
        return real(fd, data)

    groups = -(-len(plan.jobs) // context.GROUP)
    assert groups * context.GROUP * plan.jobs[0].num_bytes < groups * BATCH_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(_C, "ShardFile", Shard)
        patch.setattr(os, "write", write)
        api.merge(plan, tmp_path / "out")
    assert len(writes) == groups + 2  # and the header and its length
    assert sum(lines) == len(plan.jobs)
    assert sum(count > 0 for count in lines) == groups
    monkeypatch.setattr(context, "SMALL_BYTES", -1)
    api.merge(plan, tmp_path / "alone")
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
