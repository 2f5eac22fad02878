"""How much of this machine the process may use: memory and CPUs, as cgroups and affinity allow.

A leaf module. Everything is read from ``/proc`` and ``/sys``; where
a file is missing the limit it would state does not exist.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from pymerge.errors import PymergeError

_PROC = Path("/proc")

#: More threads than any machine has CPUs for; each costs memory.
MAX_THREADS = 1024

# cgroup v1 states "no limit" as the largest number of whole pages.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class CgroupMemory:
    """The tightest memory limit above this process: ``limit`` and what is left of it, in bytes."""

    limit: int
    available: int
    folder: Path


def total_memory(proc: Path = _PROC) -> int:
    """Bytes of memory the machine has."""
    return _meminfo(proc)["MemTotal"]


def available_memory(proc: Path = _PROC) -> int:
    """Bytes this process can take without swapping or meeting the limit of its cgroup.

    Page cache that can be dropped counts as available.
    """
    free = _meminfo(proc)["MemAvailable"]
    cgroup = cgroup_memory(proc)
    return free if cgroup is None else min(free, cgroup.available)


def available_cpus(proc: Path = _PROC) -> int:
    """CPUs this process may use: its affinity, or the cgroup's quota rounded up if that is less."""
    num_cpus = len(os.sched_getaffinity(0))
    quota = cgroup_cpus(proc)
    return num_cpus if quota is None else max(1, min(num_cpus, math.ceil(quota)))


def compute_threads(asked: int | None) -> int:
    """The threads asked for, by default one for each CPU available.

    :raises PymergeError: not a whole number from 1 to 1024.
    """
    if asked is None:
        return available_cpus()
    if isinstance(asked, bool) or not isinstance(asked, Integral) or not 1 <= asked <= MAX_THREADS:
        raise PymergeError(
            f"threads: expected a whole number of at least 1 and at most {MAX_THREADS}, "
            f"found {asked!r}; leave it out to use every CPU available"
        )
    return int(asked)


def cgroup_memory(proc: Path = _PROC) -> CgroupMemory | None:
    """The cgroup limit with the least left, or None where no cgroup above us has one."""
    tightest: CgroupMemory | None = None
    for folder, version in _cgroups(proc, "memory"):
        if version == 2:
            limit = _number(folder / "memory.max")
            used = _number(folder / "memory.current")
            cache = _statistic(folder, "inactive_file")
        else:
            limit = _number(folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.usage_in_bytes")
            cache = _statistic(folder, "total_inactive_file")
        if limit is None or used is None or limit >= _NO_LIMIT:
            continue
        available = max(0, min(limit, limit - used + cache))
        if tightest is None or available < tightest.available:
            tightest = CgroupMemory(limit, available, folder)
    return tightest


def cgroup_cpus(proc: Path = _PROC) -> float | None:
    """The smallest CPU quota of the cgroups above us, in CPUs, or None."""
    quotas: list[float] = []
    for folder, version in _cgroups(proc, "cpu"):
        if version == 2:
            words = (_text(folder / "cpu.max") or "").split()
            quota, period = words if len(words) == 2 else ("max", "100000")
        else:
            quota = _text(folder / "cpu.cfs_quota_us") or "-1"
            period = _text(folder / "cpu.cfs_period_us") or "100000"
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _meminfo(proc: Path) -> dict[str, int]:
    values: dict[str, int] = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words:
            values[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    # Kernels before 3.14 do not tell what is available.
    values.setdefault("MemAvailable", values.get("MemFree", 0) + values.get("Cached", 0))
    return values


def _cgroups(proc: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """This process's cgroup folders for a controller up to the mount point, each with its version.

    Inside a container the path in ``/proc/self/cgroup`` may not exist below the mount; then the
    mount point itself is the container's cgroup.
    """
    for version, mount_point, mount_root in _cgroup_mounts(proc, controller):
        own = _own_cgroup(proc, controller, version)
        if own is None:
            continue
        below = os.path.relpath(own, mount_root) if mount_root != "/" else own.lstrip("/")
        folder = mount_point if below.startswith("..") else mount_point / below
        if not folder.is_dir():
            folder = mount_point
        while True:
            yield folder, version
            if folder == mount_point:
                break
            folder = folder.parent


def _cgroup_mounts(proc: Path, controller: str) -> Iterator[tuple[int, Path, str]]:
    """(version, mount point, the cgroup shown there) of the hierarchies that hold a controller."""
    for line in (_text(proc / "self" / "mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            yield 2, Path(_unescape(fields[4])), _unescape(fields[3])
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            yield 1, Path(_unescape(fields[4])), _unescape(fields[3])


def _own_cgroup(proc: Path, controller: str, version: int) -> str | None:
    for line in (_text(proc / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if version == 2 and number == "0" and not controllers:
            return path
        if version == 1 and controller in controllers.split(","):
            return path
    return None


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text


def _statistic(folder: Path, name: str) -> int:
    for line in (_text(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
