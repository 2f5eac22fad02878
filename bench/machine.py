"""The machine line: what a figure was measured on. Every JSON file in bench/results carries one.

Standard library only, so that a process whose peak memory is measured by its children stays small.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pymerge-engine", "numpy", "torch", "safetensors")


def machine_line(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """CPU, cores, memory, kernel, versions, commit, date and the load before the measurement."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: installed(package) for package in packages},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def describe(machine: dict[str, Any]) -> str:
    """The machine line as one line of text."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date']}, load {machine['load_average'][0]}"
    )


def cpu_model() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of HEAD, with "+changes" where the tree differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+changes" if git("status", "--porcelain") else "")


def filesystem(path: Path) -> str:
    """Type of the filesystem that holds ``path``, from the mount table."""
    resolved = path.resolve()
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, mount_kind, *_ = line.split()
        if resolved.is_relative_to(mount) and len(mount) > len(best):
            best, kind = mount, mount_kind
    return kind
