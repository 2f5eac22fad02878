"""A merge that is killed and started again ends with the bytes of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pymerge import _C, api
from pymerge.engine import context
from pymerge.engine.journal import Journal
from pymerge.errors import PlanError

JOURNAL = ".pymerge-journal"
MIB = 1 << 20
DIED = 77
SHARDS = {"single": "5GB", "multi": "1MB"}
CASES = [*itertools.product(("linear", "ties"), SHARDS), ("emr", "multi")]


def num_lines(journal: Path) -> int:
    try:
        return journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_at(process: subprocess.Popen[str], out: Path, lines: int, delay: float) -> bool:
    """SIGKILL once the journal has so many lines and a little later; False if it ended before."""
    while process.poll() is None and num_lines(out / JOURNAL) < lines:
        time.sleep(0.0005)
    time.sleep(delay)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


class Killing:
    """One merge of the real command, and what it makes when nobody disturbs it."""

    def __init__(self, words: list[object], out: Path, whole: Path, num_tensors: int, tools: Any):
        self.words, self.out, self.whole, self.num_tensors = words, out, whole, num_tensors
        self.start, self.command, self.digests, self.check = tools

    def run(self, rng: random.Random, num_kills: int) -> int:
        """Kill several runs in a row, let the last one finish; returns how many died."""
        killed = 0
        for _ in range(num_kills):
            done = num_lines(self.out / JOURNAL)
            target = rng.randint(min(done, self.num_tensors), self.num_tensors)
            process = self.start("merge", *self.words, self.out)
            if not kill_at(process, self.out, target, rng.uniform(0, 0.004)):
                break
            killed += 1
            if self.out.exists():
                self.check(self.out, self.whole)
        if not self.out.exists() or (self.out / JOURNAL).exists():
            code, printed = self.command("merge", *self.words, self.out)
            assert code == 0, printed
        assert self.digests(self.out) == self.digests(self.whole)
        shutil.rmtree(self.out)
        return killed


@pytest.fixture
def killing(
    many: Any,
    tmp_path: Path,
    write_recipe: Any,
    start_command: Any,
    command: Any,
    digests: Any,
    check_unfinished: Any,
) -> Callable[[str, str], Killing]:
    def make(method: str, layout: str) -> Killing:
        recipe = write_recipe(tmp_path / f"{method}.yml", many.recipe(method))
        options = ["--memory", "256MiB", "--threads", 2, "--shard-size", SHARDS[layout]]
        words = [recipe, *options]
        whole = tmp_path / "whole"
        code, printed = command("merge", *words, whole)
        assert code == 0, printed
        num_tensors = len(api.plan(recipe, shard_size=SHARDS[layout]).jobs)
        tools = (start_command, command, digests, check_unfinished)
        return Killing(words, tmp_path / "out", whole, num_tensors, tools)

    return make


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_killed_at_random_moments(killing: Any, method: str, layout: str) -> None:
    case = killing(method, layout)
    rng = random.Random(f"{method} {layout}")
    killed = 0
    while killed < 5:
        killed += case.run(rng, rng.choice((1, 2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), CASES)
def test_killed_at_many_random_moments(killing: Any, method: str, layout: str) -> None:
    case = killing(method, layout)
    rng = random.Random(f"more {method} {layout}")
    killed = 0
    while killed < 40:
        killed += case.run(rng, rng.choice((1, 1, 2, 5)))


def die_at(step: int) -> None:
    """From now on the process ends without a word at the given step of its writing."""
    count = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **names: Any) -> Any:
            if next(count) == step:
                os._exit(DIED)
            return call(*args, **names)

        return wrapper

    class Shard(_C.ShardFile):  # type: ignore[misc]
        write = counted(_C.ShardFile.write)
        sync = counted(_C.ShardFile.sync)
        close = counted(_C.ShardFile.close)

    _C.ShardFile = counted(Shard)  # type: ignore[misc, assignment]
    _C.fsync_directory = counted(_C.fsync_directory)
    for name in ("replace", "write", "fsync", "ftruncate", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def steps(limit: int = 400) -> Iterator[int]:
    yield from range(1, limit)
    raise AssertionError(f"the merge did not end within {limit} steps")


@pytest.mark.parametrize(
    ("method", "shard_size"),
    [
        pytest.param("ties", "1GB", id="single"),
        pytest.param("ties", "2KB", id="multi"),
        pytest.param("emr", "1GB", id="tasks-single"),
        pytest.param("emr", "2KB", id="tasks-multi", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_step(
    tiny: Any,
    tmp_path: Path,
    child: Any,
    digests: Any,
    check_unfinished: Any,
    method: str,
    shard_size: str,
) -> None:
    """Every system call of the output is a moment to die at, those of the commit included."""
    plan = api.plan(tiny.recipe(method), memory=160 * MIB, threads=1, shard_size=shard_size)
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.merge(plan, whole)

    for step in steps():

        def merge(step: int = step) -> None:
            die_at(step)
            api.merge(plan, out)

        code = child(merge)
        if code == 0:
            break
        assert code == DIED, step
        if out.exists():
            check_unfinished(out, whole)
        if not out.exists() or (out / JOURNAL).exists() or not any(out.iterdir()):
            api.merge(plan, out)
        assert digests(out) == digests(whole), step
        shutil.rmtree(out)
    assert step > 30


def test_killed_at_every_second_step_of_a_resume(
    small: Any, tmp_path: Path, child: Any, digests: Any, check_unfinished: Any
) -> None:
    """Runs that each come a little further, until one ends."""
    plan = api.plan(small.recipe("linear"), memory=160 * MIB, threads=2, shard_size="60KB")
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.merge(plan, whole)

    for step in steps():

        def merge(step: int = step) -> None:
            die_at(2 * step)
            api.merge(plan, out)

        code = child(merge)
        if out.exists():
            check_unfinished(out, whole)
        if code == 0 or not (out / JOURNAL).exists():
            break
        assert code == DIED, step
    assert digests(out) == digests(whole)
    assert step > 5


class Stop(Exception):
    """The interruption of these tests."""


def stop_after(num_tensors: int, plan: Any, out: Path) -> None:
    """Leave a merge behind that has so many tensors in its journal."""
    add, left = Journal.add, [num_tensors]

    def counted(self: Journal, *args: Any) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(Stop):
            api.merge(plan, out)


@pytest.mark.parametrize("shard_size", ["1GB", "2KB"], ids=["single", "multi"])
def test_killed_while_taking_over_another_merge(
    tiny: Any, tmp_path: Path, child: Any, digests: Any, shard_size: str
) -> None:
    """The journal of the merge that was there must not speak of the files of the new one."""
    first, second = (
        api.plan(tiny.recipe(method), memory=160 * MIB, threads=1, shard_size=shard_size)
        for method in ("ties", "linear")
    )
    stopped, whole, out = tmp_path / "stopped", tmp_path / "whole", tmp_path / "out"
    api.merge(first, whole)
    stop_after(4, first, stopped)
    outcomes = set()

    for step in steps():
        shutil.copytree(stopped, out)

        def merge(step: int = step) -> None:
            die_at(step)
            api.merge(second, out, overwrite=True)

        assert child(merge) == DIED, step
        lines = (out / JOURNAL).read_text().splitlines()
        has_begun = second.hash in lines[0] and len(lines) > 1
        try:
            resumed = api.merge(first, out).num_resumed
        except PlanError:
            outcomes.add("refused")
        else:
            outcomes.add(resumed)
            assert digests(out) == digests(whole), step
        if has_begun:
            break
        shutil.rmtree(out)
    assert outcomes == {"refused", 0, 4}


def test_killed_while_a_lost_shard_is_created_again(
    tiny: Any, tmp_path: Path, child: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal must forget the tensors of a lost shard before the shard is there again."""
    monkeypatch.setattr(context, "SMALL_BYTES", -1)  # a line for each tensor
    plan = api.plan(tiny.recipe("linear"), memory=160 * MIB, threads=1)
    stopped, whole, out = tmp_path / "stopped", tmp_path / "whole", tmp_path / "out"
    api.merge(plan, whole)
    stop_after(4, plan, stopped)
    (stopped / "model.safetensors.partial").unlink()

    for step in steps():
        shutil.copytree(stopped, out)

        def merge(step: int = step) -> None:
            die_at(step)
            api.merge(plan, out)

        assert child(merge) == DIED, step
        has_begun = num_lines(out / JOURNAL) == 2
        api.merge(plan, out)
        assert digests(out) == digests(whole), step
        if has_begun:
            break
        shutil.rmtree(out)
    assert step > 5
