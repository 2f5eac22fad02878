"""What a plan says of the matrices: their memory, their work, and the time that both tell."""

from __future__ import annotations

import io
import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pymerge import api, terminal
from pymerge.cli import app
from pymerge.engine import matrix_rates
from pymerge.engine.matrix_rates import MatrixRates, matrix_rates_of, matrix_seconds
from pymerge.errors import PlanError
from pymerge.methods import METHODS
from pymerge.methods.protocol import Cost, Tensor
from pymerge.ops.opset import choose_ops
from pymerge.ops.workspace import Workspace

#: Linear layers of Llama 70B, [outputs, inputs].
LLAMA_70B = [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]
MATRIX_METHODS = sorted(name for name, entry in METHODS.items() if entry.cost is not None)
#: Where the defaults come to no work: the mean of LoRE's differences is the plain mean.
WORKING = {"lore": {"merge": "sum"}}
#: The basis that KnOTS's task vectors share is as large as their outputs, of dense models whole.
TOO_LARGE = {("knots", (28672, 8192))}


def cost_of(method: str, shape: tuple[int, ...], num_models: int = 8) -> Cost:
    """The cost of a layer with the method's defaults."""
    entry = METHODS[method]
    shared = {n: entry.spec.default(n, None) for n in entry.spec.parameters}
    shared |= WORKING.get(method, {})
    own = [{n: v for n, v in shared.items() if entry.spec.parameters[n].scope == "model"}]
    tensor = Tensor(
        "model.layers.0.self_attn.q_proj.weight",
        shape,
        num_models,
        entry.spec.base != "input",
        shared,
        own * num_models,
        choose_ops(entry.ops),
        statistics=[1.0] * num_models if entry.reads else (),
    )
    assert entry.cost is not None
    return entry.cost(tensor)


@pytest.mark.parametrize("shape", LLAMA_70B, ids=str)
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_70b_layers_fit_on_a_gpu_of_24_gb(method: str, shape: tuple[int, int]) -> None:
    """Eight models, float32, with room left for what a solver holds by itself."""
    cost = cost_of(method, shape)
    assert (0 < cost.num_bytes < 22e9) != ((method, shape) in TOO_LARGE)
    assert cost.flops32 + cost.flops64 + cost.eigen64 > 0


@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_work_grows_as_that_of_matrices(method: str) -> None:
    """Twice the size: at least four times the work and, but for terms of lower order, at most
    eight times."""
    small, large = (cost_of(method, (size, size)) for size in (2048, 4096))
    for kind in ("flops32", "flops64", "eigen64"):
        before, after = getattr(small, kind), getattr(large, kind)
        if before:
            assert 3.9 <= after / before <= 8.2, kind


def small_recipe(folder: Path) -> dict[str, Any]:
    import numpy as np
    from safetensors.numpy import save_file

    for index, name in enumerate(("base", "one", "two")):
        (folder / name).mkdir()
        generator = np.random.default_rng(index)
        tensors = {
            "model.layers.0.up.weight": generator.normal(size=(96, 64)).astype(np.float32),
            "model.norm.weight": generator.normal(size=64).astype(np.float32),
        }
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    return {"merge_method": "iso_c", "base_model": str(folder / "base"), "models": models}


def test_seconds_are_work_over_rates(tmp_path: Path) -> None:
    plan = api.plan(small_recipe(tmp_path), memory="600MiB")
    cost = next(job.cost for job in plan.jobs if job.name == "model.layers.0.up.weight")
    assert sum(job.cost.num_bytes > 0 for job in plan.jobs) == 1
    expected = cost.flops32 / 2 + cost.flops64 / 4 + cost.eigen64 / 8
    assert matrix_seconds(plan, MatrixRates(2.0, 4.0, 8.0)) == pytest.approx(expected)


def test_the_memory_that_is_asked_for_is_enough(tmp_path: Path) -> None:
    """With the tables of many threads, which take a share of their own."""
    recipe = small_recipe(tmp_path)
    for number in range(12):
        shutil.copytree(tmp_path / "one", tmp_path / str(number))
        recipe["models"].append({"model": str(tmp_path / str(number))})
    for threads in (1, 12, 64):
        memory, asked = 300, 0
        while True:
            try:
                plan = api.plan(recipe, memory=memory << 20, threads=threads)
                break
            except PlanError as error:
                memory, asked = int(str(error).rpartition("at least ")[2].split()[0]), asked + 1
                assert asked <= 2, "first for the matrices, then perhaps for the tiles"
        assert plan.tiling.matrix_bytes


def test_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(matrix_rates, "SIZE", 64)
    recipe = small_recipe(tmp_path)
    plan = api.plan(recipe, memory="600MiB", threads=2)
    found = matrix_rates_of(plan)
    assert found is not None
    assert min(found.flops32, found.flops64, found.eigen64) > 0
    monkeypatch.setattr(matrix_rates, "measure_matrix_rates", None)
    assert matrix_rates_of(plan) == found
    linear = {**recipe, "merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}
    assert matrix_rates_of(api.plan(linear, memory="600MiB")) is None


def test_a_device_is_waited_for_before_and_after_what_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device returns before it has computed: what warms it up must not be timed."""
    events = []
    monkeypatch.setattr(matrix_rates, "DEVICE_SIZE", 8)
    monkeypatch.setattr(Workspace, "on_host", False)
    monkeypatch.setattr(Workspace, "matmul", lambda *_: events.append("run"))
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: events.append("run"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("wait"))
    clock = iter(range(6))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("clock") or next(clock))
    matrix_rates.measure_matrix_rates(1)
    assert events == [*["run", "wait", "clock"] * 6, "wait"]


def test_the_command_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(matrix_rates, "SIZE", 64)
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(small_recipe(tmp_path)))
    words = ["plan", str(path), "--memory", "600MiB", "--folder", str(tmp_path)]
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "_out", Console(file=stream, width=400))
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "1 tensor, at most" in stream.getvalue()
    assert "(model.layers.0.up.weight)" in stream.getvalue()
    assert "s at the rates of this machine" in stream.getvalue()
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["matrices"]
    assert found["seconds"] > 0
    assert found["largest"] == "model.layers.0.up.weight"
