"""Matrices beside blocks: no job waits for what only itself could give back, memory is what the
plan says, and two merges at once in one process do not meet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pymerge import api
from pymerge.errors import PlanError

MIB = 1 << 20


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A deadlock becomes a failure."""

    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_grams(folder: Path, num_layers: int, rows: int, columns: int, seed: int) -> str:
    """A model with the Gram of its layers' inputs beside it."""
    generator = np.random.default_rng(seed)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(num_layers)]
    folder.mkdir()
    weights = {
        name: generator.normal(0, 0.02, (rows, columns)).astype(np.float32) for name in names
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    inputs = generator.normal(size=(2 * columns, columns))
    gram = (inputs.T @ inputs / len(inputs))[np.tril_indices(columns)].astype(np.float32)
    beside = folder / "pymerge-statistics"
    beside.mkdir()
    save_file({"input": gram}, beside / "gram.safetensors")
    said = {"key": "input", "columns": columns, "rows_seen": len(inputs)}
    entry = {"file": "gram.safetensors", "weights": dict.fromkeys(names, said)}
    (beside / "statistics.json").write_text(json.dumps({"format": 1, "gram": entry}))
    return str(folder)


@pytest.mark.parametrize("rows", [40, 5000])
def test_statistics_are_read_while_a_tensor_holds_all_blocks(tmp_path: Path, rows: int) -> None:
    models = [with_grams(tmp_path / str(k), 4, rows, 120, k) for k in range(2)]
    recipe = {"merge_method": "regmean", "models": [{"model": m} for m in models]}
    plan = api.plan(recipe, memory=1024 * MIB, threads=2)
    num_blocks = plan.tiling.resident_blocks(plan.jobs[0])
    tight = replace(plan, tiling=replace(plan.tiling, num_blocks=num_blocks))
    assert tight.tiling.is_resident(plan.jobs[0])
    api.merge(plan, tmp_path / "wide")
    with at_most(60):
        api.merge(tight, tmp_path / "tight")
    file = "model.safetensors"
    assert (tmp_path / "tight" / file).read_bytes() == (tmp_path / "wide" / file).read_bytes()


PEAK = """
import sys
from pymerge import api
document, out, memory = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print(api.merge(api.plan(document, memory=memory, threads=2), out).peak_memory)
"""


@pytest.mark.parametrize("method", ["iso_c", "regmean"])
def test_the_process_stays_within_the_memory(method: str, tmp_path: Path) -> None:
    """A process of its own, since the peak is that of its whole life; the least memory it takes."""
    models = [with_grams(tmp_path / str(k), 3, 1400, 900, k) for k in range(4)]
    document = {"merge_method": method, "models": [{"model": model} for model in models[1:]]}
    if method == "iso_c":
        document["base_model"] = models[0]
    with pytest.raises(PlanError) as caught:
        api.plan(document, memory=400 * MIB, threads=2)
    memory = int(str(caught.value).rpartition("at least ")[2].split()[0]) * MIB
    words = [sys.executable, "-c", PEAK, repr(document), str(tmp_path / "out"), str(memory)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= memory


def test_two_merges_at_once(small: Any, tmp_path: Path, digests: Any) -> None:
    """Each with its own threads; torch's settings of the process are as before."""
    document = {
        "merge_method": "iso_c",
        "base_model": str(small.base),
        "models": [{"model": str(path)} for path in small.tuned],
    }
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    plans = [api.plan(document, memory=600 * MIB, threads=threads) for threads in (1, 3)]
    failures: list[BaseException] = []

    def merge(number: int) -> None:
        try:
            api.merge(plans[number], tmp_path / str(number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = [
        {k: v for k, v in digests(tmp_path / str(n)).items() if "safetensors" in k} for n in (0, 1)
    ]
    assert found[0] == found[1]
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision())
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [before[0]]
