"""Matrices beside blocks: no job waits for what only itself could give back, memory is what the
plan says, and two merges at once in one process do not meet."""

from __future__ import annotations

import importlib.util
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
from pymerge.ops import device
from pymerge.plan.memory import PANEL_BYTES

PEAK_PATH = Path(__file__).parents[1] / "methods" / "matrix" / "peak.py"
_spec = importlib.util.spec_from_file_location("peak", PEAK_PATH)
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)

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
    """A process of its own, since the peak is that of its whole life."""
    models = [with_grams(tmp_path / str(k), 4, 3000, 1000, k) for k in range(4)]
    document = {"merge_method": method, "models": [{"model": model} for model in models[1:]]}
    if method == "iso_c":
        document["base_model"] = models[0]
    memory = 620 * MIB
    words = [sys.executable, "-c", PEAK, repr(document), str(tmp_path / "out"), str(memory)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= memory


def adapters(folder: Path, size: int, rank: int, count: int) -> dict[str, Any]:
    """A recipe of adapters of one square layer."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.05, shape).astype(np.float32)

    name, base = "model.layers.0.mlp.up_proj", folder / "base"
    base.mkdir()
    save_file({f"{name}.weight": draw(size, size)}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text('{"model_type": "llama"}')
    for number in range(count):
        each = folder / str(number)
        each.mkdir()
        pair = {"lora_A": draw(rank, size), "lora_B": draw(size, rank)}
        keys = {f"base_model.model.{name}.{key}.weight": value for key, value in pair.items()}
        save_file(keys, each / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["up_proj"]}
        (each / "adapter_config.json").write_text(json.dumps(config))
    models = [{"model": f"{base}+{folder / str(number)}"} for number in range(count)]
    return {"merge_method": "iso_c", "base_model": str(base), "models": models}


@pytest.mark.parametrize(("size", "rank", "count"), [(300, 36, 8), (300, 60, 8), (300, 8, 2)])
def test_factors_of_adapters_are_in_the_plan(
    size: int, rank: int, count: int, tmp_path: Path
) -> None:
    """In core space, where its dimension nears the layer's, and without it."""
    plan = api.plan(adapters(tmp_path, size, rank, count), memory=600 * MIB, threads=1)
    with peak.watched() as tally:
        api.merge(plan, tmp_path / "out")
    assert tally.peak <= plan.jobs[0].cost.num_bytes + PANEL_BYTES * size


def test_parts_of_a_tensor_follow_one_another_in_memory() -> None:
    """Not two of them at once, beside the merged tensor."""
    shape, split = (8 * 300, 300), {"split": "tensor=8"}
    stated, measured = peak.stated_and_measured("iso_c", shape, 2, threads=1, **split)
    panels = PANEL_BYTES * max(shape)
    assert measured <= stated - panels + PANEL_BYTES * 300


def test_where_matrices_are_computed_is_in_the_hash(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's products are not the CPU's to the bit; other methods' bytes are."""
    hashes = []
    for method in ("iso_c", "task_arithmetic"):
        document = {
            "merge_method": method,
            "base_model": str(small.base),
            "models": [{"model": str(path)} for path in small.tuned],
            "parameters": {"weight": 0.5},
        }
        plans = [api.plan(document, memory=600 * MIB) for _ in range(2)]
        first = plans[0].hash
        with monkeypatch.context() as patch:
            patch.setattr(device, "memory_of", lambda backend: "device")
            hashes.append(first == plans[1].hash)
    assert hashes == [False, True]


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
