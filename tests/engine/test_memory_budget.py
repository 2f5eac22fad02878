"""The memory budget is a promise about the whole process, also where one tensor exceeds it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymerge import api

MIB = 1 << 20
BUDGET = 256 * MIB
WIDTH = 4096


@pytest.fixture(scope="module")
def set_of_models(
    tmp_path_factory: pytest.TempPathFactory, save: Any, as_bf16: Any
) -> Iterator[list[str]]:
    """A base and two fine-tunes of 200 MiB each; the inputs of one tensor are 375 MiB together."""
    place = tmp_path_factory.mktemp("budget")
    rng = np.random.default_rng(3)
    base = {"embed.weight": rng.normal(0, 0.02, (16000, WIDTH)).astype(np.float32)}
    for layer in range(9):
        base[f"layers.{layer}.weight"] = rng.normal(0, 0.02, (1024, WIDTH)).astype(np.float32)
    folders = []
    for name in ("base", "first", "second"):
        noise = 0 if name == "base" else rng.normal(0, 1e-3, (1, WIDTH)).astype(np.float32)
        tensors = {key: as_bf16(array + noise * array) for key, array in base.items()}
        folders.append(str(save(place / name, tensors)))
    yield folders
    shutil.rmtree(place)


#: The peak of a process counts the memory of the one that starts it, so a small one does.
WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""


def peak_of(*words: object) -> tuple[int, int]:
    """Run a command: its peak resident size as the system tells and as the command tells."""
    run = [sys.executable, "-c", WATCH, *map(str, words)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True)
    code, peak = printed.stdout.splitlines()[-1].split()
    assert code == "0", printed.stderr
    told = re.search(r"peak memory ([\d.]+) MiB", printed.stdout)
    assert told is not None, printed.stdout
    return int(peak), int(float(told[1]) * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "ties-model"])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_peak_of_the_process(
    set_of_models: list[str],
    tmp_path: Path,
    write_recipe: Any,
    method: str,
    threads: int,
) -> None:
    base, *tuned = set_of_models
    recipe: dict[str, Any] = {
        "merge_method": method.removesuffix("-model"),
        "models": [
            {"model": path, "parameters": {"weight": 0.5, "density": 0.4}} for path in tuned
        ],
        "dtype": "bfloat16",
    }
    if method == "linear":
        recipe["models"].append({"model": base, "parameters": {"weight": 1.0}})
    else:
        recipe["base_model"] = base
    if method == "ties-model":
        recipe["parameters"] = {"trim_scope": "model"}
    path = write_recipe(tmp_path / "recipe.yml", recipe)
    options = ["--memory", "256MiB", "--threads", threads, "--no-sync"]
    command = Path(sys.executable).with_name("pymerge")
    peak, told = peak_of(command, "merge", path, tmp_path / "out", *options)
    shutil.rmtree(tmp_path / "out")
    print(f"{method}, {threads} threads: peak {peak / MIB:.0f} MiB")
    assert peak <= BUDGET
    assert told == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_bytes_read(set_of_models: list[str], tmp_path: Path, method: str) -> None:
    """A tensor that fits is read once, one that does not as often as the plan says."""
    base, *tuned = set_of_models
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in tuned],
    }
    if method == "ties":
        recipe["base_model"] = base
    plan = api.plan(recipe, memory=BUDGET, threads=2)
    report = api.merge(plan, tmp_path / "out", sync=False)
    shutil.rmtree(tmp_path / "out")
    assert len(plan.streamed) == (method == "ties")
    one_tile = plan.tiling.block_bytes * 3
    assert plan.bytes_read <= report.bytes_read <= plan.bytes_read + len(tuned) * one_tile
