"""OPCM against the authors' recurrence in float64: full SVDs, and the whole model's norms and a
rescaling after every step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peak import stated_and_measured
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.engine.journal import Journal
from pymerge.errors import StorageError

MIB = 1 << 20
Arrays = Mapping[str, np.ndarray]
SHAPES = {
    "blocks.0.fc1.bias": (70,),
    "blocks.0.fc1.weight": (70, 40),
    "blocks.0.fc2.weight": (40, 90),
    "blocks.0.proj.weight": (33, 33),
    "embed_tokens.weight": (50, 12),
    "norm.weight": (40,),
}


def draw(seed: int, scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in SHAPES.items()}


def without(delta: np.ndarray, before: np.ndarray, alpha: float) -> np.ndarray:
    """What the authors add of a task vector, but for the diagonal beyond the rank."""
    u, sigma, vh = np.linalg.svd(before)
    rank = int((sigma > 1e-6 * sigma[0]).sum())
    projected = u.T @ delta @ vh.T
    if rank:
        split = int((np.cumsum(sigma) / sigma.sum() > alpha).argmax())
        projected[range(rank), range(rank)] = 0
        projected[:split, :split] = 0
    return u @ projected @ vh


def norm(parts: Arrays) -> float:
    return float(np.sqrt(sum((part**2).sum() for part in parts.values())))


def recurrence(deltas: Sequence[Arrays], alpha: float = 0.5) -> dict[str, np.ndarray]:
    """The merged task vectors, by the official code's steps."""
    norms, merged, before = [norm(deltas[0])], dict(deltas[0]), 1.0
    for delta in deltas[1:]:
        norms.append(norm(delta))
        for name, old in merged.items():
            is_matrix = old.ndim == 2 and "embed" not in name
            new = without(delta[name], old, alpha) if is_matrix else delta[name]
            merged[name] = before * old + new
        before = norm(merged) / np.mean(norms)
        merged = {name: value / before for name, value in merged.items()}
    return merged


def write(folder: Path, tensors: Arrays) -> str:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def recipe(base: str, models: Sequence[str], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "opcm",
        "base_model": base,
        "models": [{"model": model} for model in models],
        "parameters": parameters,
        "dtype": "float32",
    }


@pytest.fixture
def models(tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """A recipe, and the exact task vectors of its four models over a base of zeros, on which they
    are stored and read without rounding."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    base = write(tmp_path / "base", zeros)
    deltas = [draw(1 + i, 1e-3 * (1 + i)) for i in range(4)]
    names = [write(tmp_path / f"tuned{i}", delta) for i, delta in enumerate(deltas)]
    exact = [{name: value.astype(float) for name, value in delta.items()} for delta in deltas]
    return recipe(base, names), exact


def merged(document: dict[str, Any], out: Path, **options: Any) -> dict[str, np.ndarray]:
    api.merge(api.plan(document, **{"memory": 600 * MIB, **options}), out)
    return load_file(out / "model.safetensors")


def difference(found: Arrays, expected: Arrays) -> float:
    """Relative to the norm of the whole model."""
    return norm({name: found[name] - expected[name] for name in expected}) / norm(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_the_authors_recurrence(models: Any, tmp_path: Path, alpha: float) -> None:
    document, deltas = models
    document["parameters"] = {"alpha": alpha}
    found = merged(document, tmp_path / "out")
    expected = recurrence(deltas, alpha)
    assert difference(found, expected) < 1e-6
    assert norm(found) == pytest.approx(np.mean([norm(delta) for delta in deltas]), rel=1e-6)


def test_one_model_comes_back(models: Any, tmp_path: Path) -> None:
    document, deltas = models
    found = merged({**document, "models": document["models"][:1]}, tmp_path / "out")
    assert difference(found, deltas[0]) < 1e-7


def test_the_order_matters(models: Any, tmp_path: Path) -> None:
    document, deltas = models
    turned = {**document, "models": document["models"][::-1]}
    found = merged(turned, tmp_path / "turned")
    assert difference(found, recurrence(deltas[::-1])) < 1e-6
    assert difference(found, recurrence(deltas)) > 0.1


@pytest.mark.parametrize("others", ["sum", "mean", "base"])
def test_the_other_tensors_share_the_factor(models: Any, tmp_path: Path, others: str) -> None:
    document, deltas = models
    document["parameters"] = {"others": others, "lambda": 0.5}
    found = merged(document, tmp_path / "out")
    matrices = [name for name in SHAPES if len(SHAPES[name]) == 2 and "embed" not in name]
    sums = {}
    for name in SHAPES:
        steps = [delta[name] for delta in deltas]
        sums[name] = steps[0]
        for step in steps[1:]:
            more = without(step, sums[name], 0.5) if name in matrices else step
            sums[name] = sums[name] + more
        if name not in matrices:
            sums[name] = sums[name] * {"sum": 1, "mean": 0.25, "base": 0}[others]
    counted = matrices if others == "base" else list(SHAPES)
    lengths = [norm({name: delta[name] for name in counted}) for delta in deltas]
    factor = 0.5 * np.mean(lengths) / norm(sums)
    assert difference(found, {name: factor * value for name, value in sums.items()}) < 1e-6


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_with_any_threads(models: Any, tmp_path: Path) -> None:
    document, _ = models
    found = []
    for threads in (1, 2, 5):
        merged(document, tmp_path / f"{threads}", threads=threads)
        found.append(contents(tmp_path / f"{threads}")["model.safetensors"])
    assert found[0] == found[1] == found[2]


def test_resume_and_nothing_left_behind(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(models[0], memory=600 * MIB)
    api.merge(plan, tmp_path / "whole")
    add, names = Journal.add, []

    def stop(self: Journal, name: str, record: Any) -> None:
        if len(names) == 3:
            raise OSError("pulled the plug")
        names.append(name)
        add(self, name, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        with pytest.raises(StorageError, match="plug"):
            api.merge(plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not [name for name in contents(tmp_path / "out") if name.startswith(".")]


def test_adapters_are_merged_in_their_core_space(tmp_path: Path) -> None:
    """The authors' null-space pairs are left out: the result is the one within the factors."""
    rng = np.random.default_rng(3)
    name, rows, columns, rank = "model.layers.0.mlp.up_proj", 60, 90, 4
    weight = f"{name}.weight"
    base = write(tmp_path / "base", {weight: np.zeros((rows, columns), np.float32)})
    deltas, adapters = [], []
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
        deltas.append({weight: 2.0 * left.astype(float) @ right})
        adapters.append(f"{base}+{folder}")
    found = merged(recipe(base, adapters), tmp_path / "out")
    expected = recurrence(deltas)
    assert difference(found, expected) < 1e-6
    dense = pymerge.merge_tensor(
        "opcm",
        np.zeros((rows, columns), np.float32),
        [delta[weight].astype(np.float32) for delta in deltas],
    )
    assert difference({weight: dense}, expected) < 1e-4  # rounding gave the products full rank


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (5, 40), (3, 6, 4)])
@pytest.mark.parametrize("kind", ["many", "same", "zero-first", "all-zero"])
def test_hard_cases(shape: tuple[int, ...], kind: str) -> None:
    """More models than rows, a model many times over, zeros; experts are matrices of their own."""
    rng = np.random.default_rng(4)
    deltas = [rng.normal(0, 1, shape) for _ in range(8 if kind == "many" else 3)]
    if kind == "same":
        deltas = deltas[:1] * 3
    if kind == "zero-first":
        deltas[0] = np.zeros(shape)
    if kind == "all-zero":
        deltas = [np.zeros(shape)] * 3
    given = [delta.astype(np.float32) for delta in deltas]
    found = pymerge.merge_tensor("opcm", np.zeros(shape, np.float32), given)
    if kind == "all-zero":
        assert (found == 0).all()
        return
    parts = [each.astype(float).reshape(-1, *shape[-2:]) for each in given]
    total = np.array(parts[0])
    for part in parts[1:]:
        for expert, step in enumerate(part):
            total[expert] += without(step, total[expert], 0.5)
    factor = np.mean([np.linalg.norm(part) for part in parts]) / np.linalg.norm(total)
    expected = (factor * total).reshape(shape)
    # A matrix of one row leaves little beside its own direction, where rounding decides.
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


def test_what_is_not_finite_stays_in_its_tensor(models: Any, tmp_path: Path) -> None:
    document, deltas = models
    path = Path(document["models"][1]["model"]) / "model.safetensors"
    spoiled = load_file(path)
    spoiled["blocks.0.proj.weight"][3, 3] = np.nan
    save_file(spoiled, path, {"format": "pt"})
    found = merged(document, tmp_path / "out")
    assert np.isnan(found.pop("blocks.0.proj.weight")).all()
    rest = [{name: delta[name] for name in found} for delta in deltas]
    assert difference(found, recurrence(rest)) < 1e-6


@pytest.mark.parametrize("shape", [(512, 384), (200, 900), (400, 400), (1500, 64)])
def test_the_stated_peak_holds(shape: tuple[int, int]) -> None:
    for alpha in (0.5, 1.0):
        stated, measured = stated_and_measured("opcm", shape, 4, alpha=alpha)
        assert measured <= stated
