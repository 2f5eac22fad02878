"""What a merge asks of the machine beside storage: open files, the page cache, long names."""

from __future__ import annotations

import errno
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import rates
from pymerge.engine.open_files import room_for_files
from pymerge.engine.rates import Rates, existing_parent, floor_seconds, rates_of
from pymerge.engine.sources import Sources
from pymerge.errors import StorageError

RATES = Rates(read=1e9, cached_read=1e10, write=1e9, copy=1e10)


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    """A soft limit of open files that leaves room below the hard one; put back at the end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = 256, before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield soft, hard
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_merge_gives_the_limit_of_open_files_back(
    small: Any, tmp_path: Path, limits: tuple[int, int]
) -> None:
    plan = api.plan(small.recipe("linear"), threads=1, shard_size="2KB")
    during = []
    api.merge(
        plan,
        tmp_path / "out",
        progress=lambda _: during.append(resource.getrlimit(resource.RLIMIT_NOFILE)),
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    soft, hard = during[0]
    assert hard == limits[1]
    assert 4 + len(plan.shards) <= soft - limits[0] < 100


def test_more_shards_than_the_limit_of_open_files(
    many: Any, tmp_path: Path, limits: tuple[int, int]
) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    plan = api.plan(many.recipe("linear"), threads=1, shard_size="2KB")
    assert len(plan.shards) > 100
    api.merge(plan, tmp_path / "out", sync=False)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, limits[1])


def test_limits_of_merges_in_several_threads_add_up(limits: tuple[int, int]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with room_for_files(20):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with room_for_files(10):
        thread.start()
        entered.wait(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[0] + 30
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[0] + 20
    leave.set()
    thread.join()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_the_hard_limit_holds(limits: tuple[int, int]) -> None:
    with room_for_files(1 << 40):
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_sources_of_another_user(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system does not tell whether they are cached: they count as not cached."""
    plan = api.plan(small.recipe("linear"), threads=1)

    def refuse(path: str) -> float:
        raise PermissionError(errno.EPERM, "asking which pages are in the page cache", path)

    monkeypatch.setattr(_C, "cached_fraction", lambda path: 0.0)
    uncached = floor_seconds(plan, RATES)
    monkeypatch.setattr(_C, "cached_fraction", refuse)
    assert floor_seconds(plan, RATES) == uncached > 0
    monkeypatch.setattr(rates, "known_rates", lambda folder: RATES)
    assert api.merge(plan, tmp_path / "out").floor_fraction is not None


def test_a_merge_faster_than_the_remembered_rates(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "known_rates", lambda folder: Rates(1.0, 1.0, 1.0, 1.0))
    fraction = api.merge(small.recipe("linear"), tmp_path / "out").floor_fraction
    assert fraction is not None
    assert fraction > 100


def test_name_that_is_too_long(small: Any, tmp_path: Path) -> None:
    plan = api.plan(small.recipe("linear"), threads=1)
    folder = tmp_path / ("x" * 300)
    with pytest.raises(StorageError, match="too long"):
        existing_parent(folder)
    assert rates_of(folder) is None
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="too long"):
            api.merge(plan, folder, overwrite=overwrite)


def test_folder_that_may_not_be_searched(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for another user's folder, which the superuser of a test may search."""
    plan = api.plan(small.recipe("linear"), threads=1)
    closed = tmp_path / "closed"
    exists = Path.exists

    def guarded(self: Path, *args: Any, **names: Any) -> bool:
        if closed in self.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return exists(self, *args, **names)

    monkeypatch.setattr(Path, "exists", guarded)
    monkeypatch.setattr("pymerge.engine.rates.known_floor", lambda plan, folder: None)
    with pytest.raises(StorageError, match=r"cannot look into the output folder.*denied"):
        api.merge(plan, closed / "out")
    with pytest.raises(StorageError, match=r"cannot look for the folder.*denied"):
        existing_parent(closed / "out")


def test_source_that_vanished(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice looks at the file, which must not hide that it could not be read."""
    plan = api.plan(small.recipe("linear"), threads=1)
    entry = next(iter(plan.checkpoints.values())).tensors["model.norm.weight"]
    lost = type(entry)(**{**vars(entry), "file": tmp_path / "gone.safetensors"})
    sources = Sources(plan.headers, "plain")

    def fail(path: Path, method: str) -> None:
        raise OSError(errno.EIO, "input/output error", path)

    monkeypatch.setattr(_C, "SourceFile", fail)
    with pytest.raises(StorageError, match=r"reading tensor 'model.norm.weight': .*check the dev"):
        sources.read(lost, 0, 1, 0, 0)
