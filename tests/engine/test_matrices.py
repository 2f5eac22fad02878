"""Merges that compute with whole matrices: from files to files, within a budget, after a stop."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pymerge import api
from pymerge.errors import InterruptedMerge, PlanError
from pymerge.methods import registry
from pymerge.methods.layout import LAYOUT
from pymerge.methods.matrices import (
    TILE_OPS,
    Matrix,
    matrix_cost,
    merge_matrices,
    others,
    put_on_base,
)
from pymerge.methods.parameters import LAMBDA, by_name
from pymerge.methods.protocol import Cost, EachTensor, Solve, Tensor
from pymerge.methods.spec import MethodSpec

MIB = 1 << 20
SPEC = MethodSpec(
    name="kept_total",
    summary="The sum of the task vectors over their norm over the whole model.",
    paper="",
    base="required",
    min_models=1,
    max_models=None,
    parameters=by_name(LAMBDA, others("base"), *LAYOUT),
    statistics="model",
)


def _cost(tensor: Tensor) -> Cost:
    return matrix_cost(tensor, lambda m, n, num: Cost(8 * m * n))


def _explore(tensor: Tensor) -> Generator[Any, Any, float]:
    squares = 0.0

    def total(matrix: Matrix) -> Generator[Any, Any, Any]:
        nonlocal squares
        found = yield from matrix.total([1.0] * matrix.num_models)
        squares = yield Solve(lambda: float(found.double().square().sum()))
        tensor.store.put(tensor.name, found.numpy())
        return found

    questions = merge_matrices(tensor, total)
    if isinstance(questions, Generator):
        yield from questions
    return squares


def _measure(tensors: Any) -> Generator[Any, Any, float]:
    found = yield EachTensor(_explore)
    return float(np.sqrt(sum(found.values())))


@pytest.fixture
def kept_total(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method that keeps the matrices of a look at the whole model."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.method(
        SPEC,
        ops=TILE_OPS,
        model_wide=lambda tensor: True,
        measure_model=_measure,
        model_looks=1,
        cost=_cost,
    )
    def merge(tensor: Tensor) -> Any:
        if tensor.store is None or len(tensor.shape) != 2 or "layers" not in tensor.name:
            return merge_matrices(tensor, lambda matrix: None)
        kept = torch.from_numpy(tensor.store.get(tensor.name))
        return put_on_base(tensor, kept, 1 / tensor.state)

    return SPEC.name


def recipe(models: Any, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(path)} for path in models.tuned],
        "parameters": parameters,
        "dtype": "float32",
    }


def values(folder: Path) -> dict[str, np.ndarray]:
    import safetensors.torch

    found = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            found[name] = tensor.double().numpy()
    return found


def isotropic(total: np.ndarray) -> np.ndarray:
    left, sigma, right = np.linalg.svd(total, full_matrices=False)
    return sigma.mean() * (left @ right)


def test_from_files_to_files(small: Any, tmp_path: Path) -> None:
    report = api.merge(recipe(small, "iso_c"), tmp_path / "out", memory=600 * MIB)
    assert report.stage_seconds["solve"] > 0
    base, tuned = values(small.base), [values(path) for path in small.tuned]
    for name, found in values(tmp_path / "out").items():
        total = sum(model[name] - base[name] for model in tuned)
        is_matrix = total.ndim == 2 and "layers" in name
        expected = base[name] + (isotropic(total) if is_matrix else total / 2)
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("name", ["iso_c", "kept_total"])
def test_same_bytes_whatever_the_means(
    name: str, kept_total: str, large: Any, tmp_path: Path, digests: Any
) -> None:
    """Threads and budgets; with the smaller one every look reads the tensor again."""
    found = {}
    for threads, memory in ((1, 1024), (2, 480), (5, 1024)):
        plan = api.plan(recipe(large, name), memory=memory * MIB, threads=threads)
        out = tmp_path / f"{threads}"
        api.merge(plan, out)
        found[threads] = {k: v for k, v in digests(out).items() if "safetensors" in k}
    assert found[1] == found[2] == found[5]


def test_what_a_look_at_the_model_kept(
    kept_total: str, small: Any, tmp_path: Path, digests: Any
) -> None:
    api.merge(recipe(small, kept_total), tmp_path / "out", memory=600 * MIB)
    base, tuned = values(small.base), [values(path) for path in small.tuned]
    totals = {
        name: sum(model[name] - base[name] for model in tuned)
        for name, value in base.items()
        if value.ndim == 2 and "layers" in name
    }
    norm = np.sqrt(sum((total**2).sum() for total in totals.values()))
    for name, found in values(tmp_path / "out").items():
        expected = base[name] + totals.get(name, 0.0) / norm
        assert np.abs(found - expected).max() < 1e-7, name
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_resume(small: Any, tmp_path: Path, digests: Any, stop_after: Any) -> None:
    plan = api.plan(recipe(small, "iso_c"), memory=600 * MIB)
    api.merge(plan, tmp_path / "whole")
    with stop_after(4):
        api.merge(plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 4
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_interrupt_ends_a_solve(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any
) -> None:
    plan = api.plan(recipe(small, "iso_c"), memory=600 * MIB)
    api.merge(plan, tmp_path / "whole")
    from pymerge.ops.workspace import Workspace

    started, before = threading.Event(), Workspace.map

    def slow(self: Workspace, task: Any, items: Any) -> Any:
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10_000):
                self.check()
                threading.Event().wait(0.001)
        return before(self, task, items)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "map", slow)
        with pytest.raises(InterruptedMerge):
            api.merge(plan, tmp_path / "out")
    api.merge(plan, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_budget_that_is_too_small_names_the_matrix(large: Any) -> None:
    with pytest.raises(PlanError, match=r"the matrices of tensor .* give at least (\d+) MiB") as e:
        api.plan(recipe(large, "iso_c"), memory=390 * MIB)
    least = int(str(e.value).rpartition("at least ")[2].split()[0])
    assert api.plan(recipe(large, "iso_c"), memory=least * MIB).tiling.matrix_bytes
    with pytest.raises(PlanError):
        api.plan(recipe(large, "iso_c"), memory=(least - 8) * MIB)


@pytest.mark.parametrize("count", [1, 3])
def test_adapters_stay_factored(tmp_path: Path, count: int) -> None:
    """Adapters of one base are merged from their factors: the base's bytes are only copied over,
    and the result is the one of the exact products."""
    generator = np.random.default_rng(5)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.05, shape).astype(np.float32)

    name, rows, columns, rank = "model.layers.0.mlp.up_proj", 70, 130, 4
    base = {f"{name}.weight": draw(rows, columns), "model.norm.weight": draw(columns)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    total = np.zeros((rows, columns))
    for number in range(count):
        folder = tmp_path / f"adapter{number}"
        folder.mkdir()
        left, right = draw(rows, rank), draw(rank, columns)
        keys = {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
        save_file(
            {f"base_model.model.{key}": value for key, value in keys.items()},
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        total += 1.5 * left.astype(float) @ right
    adapters = [{"model": f"{tmp_path}/base+{tmp_path}/adapter{i}"} for i in range(count)]
    document = {
        "merge_method": "iso_c",
        "base_model": str(tmp_path / "base"),
        "models": adapters,
        "dtype": "float32",
    }
    api.merge(document, tmp_path / "out", memory=600 * MIB)
    left, sigma, right = np.linalg.svd(total)
    kept = count * rank
    factor = sigma.sum() / rows * (left[:, :kept] @ right[:kept])
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = base[f"{name}.weight"] + factor
    assert np.abs(found[f"{name}.weight"] - expected).max() < 1e-6 * np.abs(expected).max()
    assert (found["model.norm.weight"] == base["model.norm.weight"]).all()
