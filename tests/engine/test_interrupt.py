"""SIGINT and SIGTERM stop a merge soon, say how to continue, and lose nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine.output import Output
from pymerge.engine.sources import Sources
from pymerge.errors import InterruptedMerge
from pymerge.plan import memory

JOURNAL = ".pymerge-journal"
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_command(
    many: Any,
    tmp_path: Path,
    write_recipe: Any,
    start_command: Any,
    command: Any,
    digests: Any,
    number: signal.Signals,
) -> None:
    recipe = write_recipe(tmp_path / "ties.yml", many.recipe("ties"))
    words = [recipe, tmp_path / "out", "--memory", "256MiB"]
    code, printed = command("merge", recipe, tmp_path / "whole", *words[2:])
    assert code == 0, printed
    process = start_command("merge", *words)
    while process.poll() is None and not (tmp_path / "out" / JOURNAL).exists():
        time.sleep(0.0005)
    sent = time.monotonic()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=20)
    assert time.monotonic() - sent < 2
    assert process.returncode == 130, printed
    assert f"to continue, run pymerge merge {recipe} {tmp_path / 'out'} --memory 256MiB" in printed
    assert not (tmp_path / "out" / "model.safetensors").exists()
    code, printed = command("merge", *words)
    assert code == 0, printed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals, int], None]:
    """Arranges for a signal to this process when a shard is written for the n-th time."""

    def arrange(number: signal.Signals, nth: int) -> None:
        left = [nth]

        class Shard(_C.ShardFile):  # type: ignore[misc]
            def write(self, offset: int, address: int, length: int) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), number)
                    time.sleep(0.2)
                super().write(offset, address, length)

        monkeypatch.setattr(_C, "ShardFile", Shard)

    return arrange


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_tensors_in_flight_are_kept(
    small: Any, tmp_path: Path, digests: Any, signal_at: Any, method: str, number: signal.Signals
) -> None:
    plan = api.plan(small.recipe(method), threads=1)
    api.merge(plan, tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in SIGNALS]
    signal_at(number, 3)
    with pytest.raises(InterruptedMerge, match=r"\d of 9 tensors are written; to continue, again"):
        api.merge(plan, tmp_path / "out", resume_hint="again")
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    text = (tmp_path / "out" / JOURNAL).read_text()
    written = text.count('"tensor"')
    assert written >= 1
    assert f'"durable":{written}' in text.splitlines()[-1]
    report = api.merge(plan, tmp_path / "out")
    assert report.num_resumed == written
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_tensor_that_fits_is_not_read_to_its_end(
    large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of many tiles is left in the middle."""
    monkeypatch.setattr(memory, "LARGEST_BLOCK", (16 << 10) + 8192)
    plan = api.plan(large.recipe("ties"), memory="256MiB", threads=1)
    assert plan.tiling.num_tiles(plan.jobs[0]) > 20
    real, reads = Sources.read, []

    def read(self: Sources, *args: Any) -> int:
        reads.append(args)
        if len(reads) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        if len(reads) >= 5:
            time.sleep(0.2)
        return real(self, *args)

    monkeypatch.setattr(Sources, "read", read)
    with pytest.raises(InterruptedMerge):
        api.merge(plan, tmp_path / "out")
    assert len(reads) < 40


def test_no_signals_in_other_threads(small: Any, tmp_path: Path) -> None:
    """Only the main thread can listen; a merge elsewhere must not fail for it."""
    reports: list[Any] = []

    def merge() -> None:
        reports.append(api.merge(small.recipe("linear"), tmp_path / "out"))

    thread = threading.Thread(target=merge)
    thread.start()
    thread.join()
    assert reports[0].num_tensors == 9


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_commit_is_not_interrupted(
    small: Any,
    tmp_path: Path,
    digests: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    api.merge(small.recipe("linear"), tmp_path / "whole")
    commit = Output.commit

    def signalled(self: Output, *args: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        commit(self, *args)

    monkeypatch.setattr(Output, "commit", signalled)
    api.merge(small.recipe("linear"), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
