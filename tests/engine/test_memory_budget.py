"""The memory budget is a promise about the whole process, also where one tensor exceeds it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
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


def peak_of(process: Any) -> int:
    """Wait for a process; its peak resident size in bytes."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    printed = process.stdout.read()
    process.stdout.close()
    assert process.returncode == 0, printed
    return int(usage.ru_maxrss * 1024)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "ties-model"])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_peak_of_the_process(
    set_of_models: list[str],
    tmp_path: Path,
    write_recipe: Any,
    start_command: Callable[..., Any],
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
    options = ["--memory", "256MiB", "--threads", threads, "--no-sync", "--quiet"]
    peak = peak_of(start_command("merge", path, tmp_path / "out", *options))
    shutil.rmtree(tmp_path / "out")
    print(f"{method}, {threads} threads: peak {peak / MIB:.0f} MiB")
    assert peak <= BUDGET + 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_bytes_read(set_of_models: list[str], tmp_path: Path, method: str) -> None:
    """A tensor that fits is read once, one that does not as often as the plan says."""
    base, *tuned = set_of_models
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in tuned],
        "base_model": base,
    }
    plan = api.plan(recipe, memory=BUDGET, threads=2)
    report = api.merge(plan, tmp_path / "out", sync=False)
    shutil.rmtree(tmp_path / "out")
    assert len(plan.streamed) == (method == "ties")
    one_tile = plan.tiling.block_bytes * 3
    assert plan.bytes_read <= report.bytes_read <= plan.bytes_read + len(tuned) * one_tile
