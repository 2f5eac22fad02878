"""LoRE against its coordinate descent in float64: full SVDs, all of base and task vectors kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peak import stated_and_measured
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api

MIB = 1 << 20
WEIGHTS = {"fixed": 0.01, "squared": 0.05}


def draw(seed: int, num: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Models with what they share, updates of rank 3 and noise."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.02, shape)
    *experts, rows, columns = shape
    low = [
        rng.normal(0, 0.05, (*experts, rows, 3)) @ rng.normal(0, 0.05, (*experts, 3, columns))
        for _ in range(num)
    ]
    return [(shared + each + rng.normal(0, 1e-3, shape)).astype(np.float32) for each in low]


def lowered(x: np.ndarray, weight: float, how: str) -> np.ndarray:
    """The minimiser of ‖δ − x‖² + weight·penalty(δ), its singular values by bisection."""
    u, sigma, vh = np.linalg.svd(x, full_matrices=False)
    threshold = weight
    if how == "squared":
        low, high = 0.0, float(sigma.max())
        for _ in range(200):
            threshold = (low + high) / 2
            too_low = weight * np.maximum(sigma - threshold, 0).sum() > threshold
            low, high = (threshold, high) if too_low else (low, threshold)
    return u * np.maximum(sigma - threshold, 0) @ vh


def descent(
    models: Sequence[np.ndarray], weight: float, steps: int = 20, how: str = "fixed"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """θ and the δᵢ."""
    exact = [model.astype(float) for model in models]
    base, deltas = np.mean(exact, axis=0), [np.zeros(exact[0].shape)] * len(exact)
    for _ in range(steps):
        deltas = [lowered(model - base, weight, how) for model in exact]
        base = np.mean([m - d for m, d in zip(exact, deltas, strict=True)], axis=0)
    return base, deltas


def elected(deltas: Sequence[np.ndarray], density: float) -> np.ndarray:
    """The largest of each, the sign of their sum, the mean of those that agree."""
    kept = []
    for delta in deltas:
        smallest = np.sort(np.abs(delta).ravel())[-max(1, int(density * delta.size))]
        kept.append(np.where(np.abs(delta) >= smallest, delta, 0))
    stack = np.stack(kept)
    agree = np.where(stack.sum(0) >= 0, stack > 0, stack < 0)
    return (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)


def combined(base: np.ndarray, deltas: Sequence[np.ndarray], how: str, factor: float) -> np.ndarray:
    total = sum(deltas) if how == "sum" else np.mean(deltas, axis=0)
    return base + factor * (elected(deltas, 0.2) if how == "ties" else total)


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("threshold", ["fixed", "squared"])
@pytest.mark.parametrize("merge", ["mean", "sum", "ties"])
@pytest.mark.parametrize("shape", [(60, 40), (30, 70), (45, 45)])
def test_the_coordinate_descent(
    shape: tuple[int, int], merge: str, threshold: str, based: bool
) -> None:
    models = draw(1, 4, shape)
    parameters = {"merge": merge, "threshold": threshold, "mu": WEIGHTS[threshold], "lambda": 0.7}
    base = models[0] - np.float32(0.01) if based else None
    found = pymerge.merge_tensor("lore", base, models, **parameters)
    low, deltas = descent(models, WEIGHTS[threshold], how=threshold)
    expected = combined(low, deltas, merge, 0.7)
    assert gap(expected, np.mean(models, axis=0)) > 1e-3
    # An element on the border of what TIES keeps, or of two signs, may fall to either side.
    close = np.abs(found - expected) < 5e-7 * np.abs(expected).max()
    assert close.mean() == 1 if merge != "ties" else close.mean() > 0.999


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_number_of_steps(steps: int) -> None:
    models = draw(2, 3, (40, 50))
    found = pymerge.merge_tensor("lore", None, models, merge="sum", iterations=steps)
    low, deltas = descent(models, 0.01, steps)
    assert gap(found, low + sum(deltas)) < 5e-7


@pytest.mark.parametrize("threshold", ["fixed", "squared"])
@pytest.mark.parametrize(
    ("num", "merge", "factor"),
    [
        (4, "mean", 1.0),
        (4, "sum", 0.25),
        (2, "mean", 0.3),
        (2, "sum", 2.0),
        (1, "mean", 3.0),
        (1, "ties", 2.0),
    ],
)
def test_settings_that_give_the_plain_mean(
    num: int, merge: str, factor: float, threshold: str
) -> None:
    """The descent does, in float64; pymerge leaves it out."""
    models = draw(3, num, (30, 20))
    mean = np.mean([model.astype(float) for model in models], axis=0)
    low, deltas = descent(models, WEIGHTS[threshold], how=threshold)
    assert gap(combined(low, deltas, merge, factor), mean) < 1e-13
    parameters = {"merge": merge, "lambda": factor, "threshold": threshold}
    found = pymerge.merge_tensor("lore", None, models, **parameters)
    plain = pymerge.merge_tensor("linear", None, models, weight=1.0)
    assert (found == plain).all()
    if num > 1:
        assert max(np.abs(delta).max() for delta in deltas) > 1e-3


def test_nothing_above_the_threshold() -> None:
    models = draw(4, 3, (20, 30))
    mean = np.mean([model.astype(float) for model in models], axis=0)
    for merge in ("sum", "ties"):
        found = pymerge.merge_tensor("lore", None, models, mu=100.0, merge=merge, lambda_=5.0)
        assert gap(found, mean) < 1e-7


def test_no_penalty_keeps_everything() -> None:
    models = draw(5, 3, (20, 30))
    mean = np.mean([model.astype(float) for model in models], axis=0)
    rest = [model - mean for model in models]
    found = pymerge.merge_tensor("lore", None, models, mu=0.0, merge="ties", lambda_=0.5)
    close = np.abs(found - combined(mean, rest, "ties", 0.5)) < 1e-7
    assert close.mean() > 0.99


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (4, 30), (3, 8, 6)])
@pytest.mark.parametrize("same", [False, True])
def test_hard_shapes(shape: tuple[int, ...], same: bool) -> None:
    """More models than rows, a model many times over, experts that are matrices of their own."""
    models = draw(6, 5, shape)
    if same:
        models = models[:1] * 5
    found = pymerge.merge_tensor("lore", None, models, merge="sum").reshape(-1, *shape[-2:])
    parts = [model.reshape(-1, *shape[-2:]) for model in models]
    for expert, result in enumerate(found):
        low, deltas = descent([part[expert] for part in parts], 0.01)
        assert gap(result, low + sum(deltas)) < 1e-6


def test_what_is_not_finite_spoils_its_tensor() -> None:
    models = draw(7, 3, (20, 30))
    models[1][3, 4] = np.inf
    assert np.isnan(pymerge.merge_tensor("lore", None, models, merge="sum")).all()


def test_vectors_and_tables_become_the_mean() -> None:
    rng = np.random.default_rng(8)
    for shape, name in (
        ((30,), "norm.weight"),
        ((9, 4), "embed_tokens.weight"),
        ((2, 3, 3, 3), "w"),
    ):
        models = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
        for base in (None, models[0]):
            found = pymerge.merge_tensor("lore", base, models, name=name, merge="sum", lambda_=9.0)
            assert gap(found, np.mean(models, axis=0, dtype=float)) < 5e-7


def test_same_bytes_with_any_threads() -> None:
    models = draw(9, 3, (700, 300))
    for merge in ("sum", "ties"):
        found = [
            pymerge.merge_tensor("lore", None, models, threads=t, merge=merge, iterations=3)
            for t in (1, 2, 5)
        ]
        assert (found[0] == found[1]).all()
        assert (found[0] == found[2]).all()


def write(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def recipe(models: Sequence[str], base: str | None = None, **parameters: Any) -> dict[str, Any]:
    document = {
        "merge_method": "lore",
        "models": [{"model": model} for model in models],
        "parameters": parameters,
        "dtype": "float32",
    }
    return document if base is None else {**document, "base_model": base}


def test_files_without_a_base(tmp_path: Path) -> None:
    models = draw(10, 3, (40, 30))
    rng = np.random.default_rng(11)
    norms = [rng.normal(size=30).astype(np.float32) for _ in models]
    folders = [
        write(tmp_path / f"{i}", {"blocks.weight": model, "norm.weight": norm})
        for i, (model, norm) in enumerate(zip(models, norms, strict=True))
    ]
    api.merge(api.plan(recipe(folders, merge="sum"), memory=600 * MIB), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    low, deltas = descent(models, 0.01)
    assert gap(found["blocks.weight"], low + sum(deltas)) < 5e-7
    assert gap(found["norm.weight"], np.mean(norms, axis=0, dtype=float)) < 5e-7


@pytest.mark.parametrize("merge", ["sum", "ties"])
def test_adapters(tmp_path: Path, merge: str) -> None:
    """In their core space, or as the products of their factors."""
    rng = np.random.default_rng(12)
    name, rows, columns, rank = "model.layers.0.mlp.up_proj", 60, 90, 4
    weights = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    base = write(tmp_path / "base", {f"{name}.weight": weights})
    models, adapters = [], []
    for number in range(3):
        folder = tmp_path / f"adapter{number}"
        folder.mkdir()
        left = rng.normal(0, 0.05, (rows, rank)).astype(np.float32)
        right = rng.normal(0, 0.05, (rank, columns)).astype(np.float32)
        keys = {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
        save_file(
            {f"base_model.model.{key}": value for key, value in keys.items()},
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        models.append(weights + 2.0 * left.astype(float) @ right)
        adapters.append(f"{base}+{folder}")
    plan = api.plan(recipe(adapters, base, merge=merge, mu=0.1), memory=600 * MIB)
    api.merge(plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    expected = combined(*descent(models, 0.1), merge, 1.0)
    close = np.abs(found - expected) < 1e-6 * np.abs(expected).max()
    assert close.all() if merge == "sum" else close.mean() > 0.999


@pytest.mark.parametrize(
    ("num", "parameters", "sentence"),
    [
        (3, {}, "lore with merge: mean and lambda: 1 is the plain mean"),
        (4, {"merge": "sum", "lambda": 0.25}, "lore with merge: sum and lambda: 0.25 is"),
        (2, {"merge": "mean", "lambda": 0.5}, "lore of two models with merge: mean is"),
        (2, {"merge": "sum"}, "lore of two models with merge: sum is"),
        (1, {"merge": "ties"}, "lore of one model is"),
        (3, {"lambda": 0.5}, None),
        (3, {"merge": "sum"}, None),
        (2, {"merge": "ties"}, None),
    ],
)
def test_the_plan_warns_of_the_plain_mean(
    tmp_path: Path, num: int, parameters: dict[str, Any], sentence: str | None
) -> None:
    tensors = [dict(zip("abc", [model] * 3, strict=True)) for model in draw(13, num, (8, 6))]
    folders = [write(tmp_path / f"{i}", each) for i, each in enumerate(tensors)]
    plan = api.plan(recipe(folders, **parameters), memory=600 * MIB)
    found = [warning for warning in plan.warnings if "lore" in warning]
    assert len(found) == (0 if sentence is None else 1)
    if sentence is not None:
        assert found[0].startswith(sentence)
        assert "plain mean of the models" in found[0]
        assert all(job.cost.num_bytes == 0 for job in plan.jobs)


@pytest.mark.parametrize("shape", [(512, 384), (200, 900), (400, 400), (1500, 64)])
@pytest.mark.parametrize("merge", ["sum", "ties"])
def test_the_stated_peak_holds(shape: tuple[int, int], merge: str) -> None:
    for num in (3, 6):
        stated, measured = stated_and_measured("lore", shape, num, merge=merge, iterations=2)
        assert measured <= stated
