"""Merge matrices with pymerge, told by the same file of jobs as tests/parity/drive_fusionbench.py.

    python bench/matrix_ours.py JOBS.json

A job names the method of pymerge in ``method`` and its parameters in ``options``. Several matrices
are merged side by side, one thread each, as the engine's jobs are; one alone gets all threads.
Writes merged.safetensors and report.json with the seconds of each repetition and the bytes by which
the first one raised the resident memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import pymerge


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peak_start() -> int | None:
    """Where the resident memory is, with its peak set back; None where that is not allowed."""
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    return resident("VmRSS")


def merge_all(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every matrix of the job by pymerge."""
    names = [key.removeprefix("base/") for key in tensors if key.startswith("base/")]
    num = sum(key.endswith("/" + names[0]) and key.startswith("task/") for key in tensors)
    threads = job["threads"]

    def merge(name: str) -> torch.Tensor:
        tasks = [tensors[f"task/{i}/{name}"] for i in range(num)]
        found: torch.Tensor = pymerge.merge_tensor(
            job["method"],
            tensors[f"base/{name}"],
            tasks,
            threads=threads if len(names) == 1 else 1,
            backend="cpu",
            **job["options"],
        )
        return found

    if len(names) == 1:
        return {names[0]: merge(names[0])}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(merge, names), strict=True))


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True)
        tensors = load_file(job["tensors"])
        report: dict[str, Any] = {"seconds": [], "peak_bytes": None}
        torch.ones(8, 8) @ torch.ones(8, 8)
        for _ in range(job.get("repeat", 1)):
            before = peak_start() if not report["seconds"] else None
            start = time.perf_counter()
            merged = merge_all(job, tensors)
            report["seconds"].append(time.perf_counter() - start)
            if before is not None:
                report["peak_bytes"] = max(0, resident("VmHWM") - before)
        save_file(merged, out / "merged.safetensors")
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
