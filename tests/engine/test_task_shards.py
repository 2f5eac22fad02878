"""The shards beside a model are as safe as the model's own: they are reserved, journalled, resumed
and checked, and without them there is no model."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import pymerge
from pymerge import _C, api
from pymerge.engine import context
from pymerge.engine.journal import Journal, Record
from pymerge.errors import CheckpointError, PlanError, StorageError

JOURNAL = ".pymerge-journal"


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "multi"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 11, 30, 39])
def test_disk_filled_in_the_middle(
    small: Any, tmp_path: Path, digests: Any, nth: int, shard_size: str
) -> None:
    """The n-th write and all later ones find the disk full, those of the masks too; small tensors
    are written together, or with the large numbers one by one."""
    plan = api.plan(small.recipe("emr"), threads=2, shard_size=shard_size)
    left = [nth]

    class Shard(_C.ShardFile):  # type: ignore[misc]
        def write(self, offset: int, address: int, length: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            super().write(offset, address, length)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "ShardFile", Shard)
        if nth > 11:
            patch.setattr(context, "SMALL_BYTES", -1)
        with pytest.raises(StorageError, match="no space left"):
            api.merge(plan, out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "model.safetensors.index.json").exists()
    assert not (out / "tasks.json").exists()
    with pytest.raises(CheckpointError):
        pymerge.load_task(out, 0)
    api.merge(plan, out)
    api.merge(plan, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_space_is_asked_for_all_shards(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(small.recipe("emr"))
    model = sum(shard.num_bytes for shard in plan.model_shards)
    monkeypatch.setattr(_C, "free_bytes", lambda path: model * 3 // 2)
    with pytest.raises(StorageError, match=f"needs {plan.bytes_written * 101 // 100:,} bytes"):
        api.merge(plan, tmp_path / "out")


def test_scales_of_a_resumed_merge(small: Any, tmp_path: Path, stop_after: Any) -> None:
    """What was measured before the interruption is read from the journal, to the last bit."""
    plan = api.plan(small.recipe("emr"), threads=1)
    with stop_after(5):
        api.merge(plan, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    records = [line for line in lines if "tensor" in line]
    assert [len(line["parts"]) for line in records] == [2] * 5
    assert [len(line["values"]) for line in records] == [4] * 5  # two sums of each of two tasks
    assert api.merge(plan, tmp_path / "out").num_resumed == 5
    api.merge(plan, tmp_path / "whole")
    found, whole = (
        (tmp_path / name / "tasks.json").read_bytes().replace(name.encode(), b"")
        for name in ("out", "whole")
    )
    assert found == whole


@pytest.mark.parametrize("values", [(0.1, 1e-310, 3.0), (float("inf"), 2.0**-1074, 1 / 3)])
def test_values_survive_the_journal(tmp_path: Path, values: tuple[float, ...]) -> None:
    journal = Journal(tmp_path)
    record = Record(7, 0, (1, 0xFFFFFFFF), values)
    journal.begin("plan", {"tensor": record})
    assert journal.read().records == {"tensor": record}
    journal.close()


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "multi"])
def test_lost_shard_is_written_again(
    small: Any, tmp_path: Path, digests: Any, stop_after: Any, shard_size: str
) -> None:
    """With a shard its tensors are lost, and with them what other shards hold of them."""
    plan = api.plan(small.recipe("emr"), threads=1, shard_size=shard_size)
    out = tmp_path / "out"
    with stop_after(len(plan.jobs) - 1):
        api.merge(plan, out)
    lost = sorted(out.glob("tasks*"))[0]
    lost.unlink()
    try:
        report = api.merge(plan, out)
    except PlanError as error:  # a shard of the model that was complete is so no more
        assert "give --overwrite to continue without them" in str(error)  # noqa: PT017
        report = api.merge(plan, out, overwrite=True)
    assert report.num_resumed < len(plan.jobs) - 1
    api.merge(plan, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_tasks_alone_are_no_model(small: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.merge(small.recipe("emr"), out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found no weights"):
        api.plan({"merge_method": "passthrough", "models": [{"model": str(out)}]})
