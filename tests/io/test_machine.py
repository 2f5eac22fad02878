from __future__ import annotations

import os
from pathlib import Path

import pytest

from pymerge import machine

MEMINFO = "MemTotal: 16000 kB\nMemFree: 1000 kB\nMemAvailable: 8000 kB\nCached: 500 kB\n"


def fake_machine(tmp_path: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """A /proc folder; ``{cgroups}`` in mountinfo stands for the folder that holds ``files``."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup dir"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(cgroup)
    point = str(cgroups).replace(" ", "\\040")
    (proc / "self" / "mountinfo").write_text(mountinfo.replace("{cgroups}", point))
    for name, text in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


V2 = "30 1 0:26 / {cgroups} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = (
    "31 1 0:27 / {cgroups}/memory rw - cgroup cgroup rw,memory\n"
    "32 1 0:28 / {cgroups}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def test_without_cgroups(tmp_path: Path) -> None:
    proc = fake_machine(tmp_path, "", "", {})
    assert machine.total_memory(proc) == 16000 * 1024
    assert machine.available_memory(proc) == 8000 * 1024
    assert machine.cgroup_memory(proc) is None
    assert machine.available_cpus(proc) == len(os.sched_getaffinity(0))


def test_version_2_takes_the_tightest_of_all_parents(tmp_path: Path) -> None:
    proc = fake_machine(
        tmp_path,
        "0::/slice/job\n",
        V2,
        {
            "slice/memory.max": "5000000\n",
            "slice/memory.current": "4000000\n",
            "slice/memory.stat": "anon 3\ninactive_file 500000\n",
            "slice/cpu.max": "150000 100000\n",
            "slice/job/memory.max": "max\n",
            "slice/job/memory.current": "100\n",
            "slice/job/cpu.max": "max 100000\n",
        },
    )
    limit = machine.cgroup_memory(proc)
    assert limit is not None
    assert (limit.limit, limit.available) == (5_000_000, 1_500_000)
    assert machine.available_memory(proc) == 1_500_000
    assert machine.cgroup_cpus(proc) == 1.5
    assert machine.available_cpus(proc) == min(2, len(os.sched_getaffinity(0)))


def test_version_2_inside_a_container(tmp_path: Path) -> None:
    files = {"memory.max": "1000\n", "memory.current": "2000\n", "cpu.max": "20000 100000\n"}
    proc = fake_machine(tmp_path, "0::/host/path/not/mounted\n", V2, files)
    limit = machine.cgroup_memory(proc)
    assert limit is not None
    assert limit.available == 0
    assert machine.available_cpus(proc) == 1


@pytest.mark.parametrize(("own", "root"), [("/job", "/"), ("/docker/abc/job", "/docker/abc")])
def test_version_1(tmp_path: Path, own: str, root: str) -> None:
    proc = fake_machine(
        tmp_path,
        f"4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n",
        V1.replace(" / ", f" {root} "),
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5\n",
            "memory/job/memory.limit_in_bytes": "3000000\n",
            "memory/job/memory.usage_in_bytes": "1000000\n",
            "memory/job/memory.stat": "total_inactive_file 200\n",
            "cpu/job/cpu.cfs_quota_us": "400000\n",
            "cpu/job/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
        },
    )
    limit = machine.cgroup_memory(proc)
    assert limit is not None
    assert (limit.limit, limit.available) == (3_000_000, 2_000_200)
    assert machine.cgroup_cpus(proc) == 4


def test_affinity_is_respected() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert machine.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_this_machine() -> None:
    assert 0 < machine.available_memory() <= machine.total_memory()
    assert 1 <= machine.available_cpus() <= len(os.sched_getaffinity(0))
