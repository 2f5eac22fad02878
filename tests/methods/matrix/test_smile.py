"""smile's factors and routers against a decomposition in float64, tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.errors import RecipeError
from pymerge.runtime.smile_folder import open_smile

_spec = importlib.util.spec_from_file_location("peak", Path(__file__).with_name("peak.py"))
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)

SHAPES = [(40, 24), (24, 40), (1, 17), (17, 1), (1, 1), (130, 110)]


def problem(
    shape: tuple[int, int], num: int = 3, seed: int = 0, decay: float = 0.9
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weights, and fine-tunes of them whose differences have a decaying spectrum."""
    generator = np.random.default_rng(seed)
    base = generator.normal(0, 0.05, shape).astype(np.float32)
    rank = min(shape)
    tuned = []
    for _ in range(num):
        left, right = (np.linalg.qr(generator.normal(size=(n, rank)))[0] for n in shape)
        delta = (left * 0.1 * decay ** np.arange(rank)) @ right.T
        tuned.append((base + delta).astype(np.float32))
    return base, tuned


def deltas_of(base: np.ndarray, tuned: list[np.ndarray]) -> list[np.ndarray]:
    return [(each - base).astype(float) for each in tuned]


def products(found: dict[str, np.ndarray]) -> list[np.ndarray]:
    pairs = zip(found["smile.up"], found["smile.down"], strict=True)
    return [up.astype(float) @ down for up, down in pairs]


@pytest.mark.parametrize("svd", ["gram", "exact"])
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_the_best_of_their_rank(shape: tuple[int, int], k: int, svd: str) -> None:
    base, tuned = problem(shape)
    found = pymerge.merge_tensor("smile", base, tuned, k=k, svd=svd)
    for expert, delta in zip(products(found), deltas_of(base, tuned), strict=True):
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        best = (left[:, :k] * values[:k]) @ right[:k]
        tail = np.linalg.norm(values[k:])
        error = np.linalg.norm(delta - expert)
        # gram leaves out what is below a thousandth of the largest.
        lost = 1e-3 * np.sqrt(min(shape)) if svd == "gram" else 1e-5
        assert error <= 1.0001 * tail + lost * values[0]
        if svd == "exact":
            assert np.abs(expert - best).max() < 1e-5 * values[0]
    assert found["smile.up"].shape == (3, shape[0], min(k, *shape))
    for up in found["smile.up"]:
        gram = up.T.astype(float) @ up
        kept = np.diag(gram) > 0
        # A direction near the cut is as exact as float32 squares resolve it.
        bound = 1e-2 if svd == "gram" else 1e-4
        assert np.abs(gram - np.diag(kept.astype(float))).max() < bound


@pytest.mark.parametrize("svd", ["gram", "exact"])
@pytest.mark.parametrize("by_difference", [True, False])
@pytest.mark.parametrize("gate_k", [1, 3, 1000])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (1, 17), (17, 1)])
def test_routers_are_the_leading_input_directions(
    shape: tuple[int, int], gate_k: int, by_difference: bool, svd: str
) -> None:
    """As projections, which do not depend on signs or on a rotation within the subspace."""
    base, tuned = problem(shape, decay=0.7)
    found = pymerge.merge_tensor(
        "smile", base, tuned, k=2, gate_k=gate_k, routing_use_diff=by_difference, svd=svd
    )["smile.router"]
    rank = min(gate_k, *shape)
    assert found.shape == (3, rank, shape[1])
    sources = deltas_of(base, tuned) if by_difference else [each.astype(float) for each in tuned]
    for rows, source in zip(found.astype(float), sources, strict=True):
        _, values, right = np.linalg.svd(source, full_matrices=False)
        # Directions whose values float32 resolves.
        rank = min(rank, int((values > 2e-3 * values[0]).sum()))
        top = right[:rank]
        assert np.abs(rows[:rank].T @ rows[:rank] - top.T @ top).max() < 2e-2
        norms = np.linalg.norm(rows, axis=1)
        assert np.all((np.abs(norms - 1) < 1e-4) | (norms == 0))


def test_randomized_is_near_the_best() -> None:
    base, tuned = problem((120, 90), decay=0.95)
    found = pymerge.merge_tensor("smile", base, tuned, k=10, gate_k=2, svd="randomized")
    for expert, delta in zip(products(found), deltas_of(base, tuned), strict=True):
        values = np.linalg.svd(delta)[1]
        best = np.linalg.norm(values[10:])
        assert best <= np.linalg.norm(delta - expert) < 1.01 * best


@pytest.mark.parametrize("k", [0, -1])
def test_whole_differences(k: int) -> None:
    base, tuned = problem((20, 30))
    found = pymerge.merge_tensor("smile", base, tuned, k=k)
    assert found.keys() == {"smile.dense", "smile.router"}
    expected = np.stack([each - base for each in tuned])
    np.testing.assert_array_equal(found["smile.dense"], expected)


def test_directions_beyond_the_rank_are_zeros() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=(30, 20)).astype(np.float32)
    delta = (generator.normal(size=(30, 3)) @ generator.normal(size=(3, 20))).astype(np.float32)
    zero = np.zeros_like(base)
    found = pymerge.merge_tensor("smile", zero, [delta, zero, delta], k=8, gate_k=5)
    for expert in (0, 2):
        assert (np.linalg.norm(found["smile.down"][expert], axis=1) > 0).tolist() == 3 * [
            True
        ] + 5 * [False]
        assert not found["smile.router"][expert, 3:].any()
        assert not found["smile.up"][expert, :, 3:].any()
    assert np.abs(products(found)[0] - delta).max() < 1e-5 * np.abs(delta).max() * 30
    assert not any(part[1].any() for part in found.values())
    np.testing.assert_array_equal(found["smile.up"][0], found["smile.up"][2])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_that_float32_cannot_square(size: float) -> None:
    base, tuned = problem((20, 30), num=2)
    scaled = [((each - base) * np.float32(size)).astype(np.float32) for each in tuned]
    found = pymerge.merge_tensor("smile", np.zeros_like(base), scaled, k=20, svd="exact")
    for expert, delta in zip(products(found), scaled, strict=True):
        assert np.abs(expert / size - delta.astype(float) / size).max() < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("svd", ["gram", "exact", "randomized"])
def test_an_expert_with_non_finite_elements_is_nan(svd: str, bad: float) -> None:
    base, tuned = problem((20, 30))
    tuned[1][3, 4] = bad
    found = pymerge.merge_tensor("smile", base, tuned, k=4, svd=svd)
    for part in found.values():
        assert np.isnan(part[1]).all()
        assert np.isfinite(part[[0, 2]]).all()


@pytest.mark.parametrize("svd", ["gram", "exact", "randomized"])
def test_threads_do_not_change_a_bit(svd: str) -> None:
    base, tuned = problem((400, 300))
    found = [
        pymerge.merge_tensor("smile", base, tuned, k=16, gate_k=4, svd=svd, threads=threads)
        for threads in (1, 2, 5)
    ]
    for part, array in found[0].items():
        assert all(array.tobytes() == each[part].tobytes() for each in found[1:])


@pytest.mark.parametrize("svd", ["gram", "exact", "randomized"])
@pytest.mark.parametrize("parameters", [{"k": 16}, {"k": 4, "routing_use_diff": False}, {"k": 0}])
@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (450, 450)])
def test_stated_memory(shape: tuple[int, int], parameters: dict[str, Any], svd: str) -> None:
    stated, three = peak.stated_and_measured("smile", shape, 3, threads=1, svd=svd, **parameters)
    assert three <= stated
    _, five = peak.stated_and_measured("smile", shape, 5, threads=1, svd=svd, **parameters)
    # One model at a time: only what is kept grows.
    assert five - three <= 2 * 4 * 17 * sum(shape) + 1000


def test_a_bfloat16_tensor() -> None:
    """Every part is the float32 one, rounded once."""
    base, tuned = problem((50, 40))
    pair = [torch.from_numpy(each).bfloat16() for each in (base, *tuned)]
    found = pymerge.merge_tensor("smile", pair[0], pair[1:], k=6, gate_k=2)
    wide = pymerge.merge_tensor(
        "smile", pair[0].float(), [each.float() for each in pair[1:]], k=6, gate_k=2
    )
    assert found.keys() == wide.keys()
    for name, part in found.items():
        assert part.dtype == torch.bfloat16
        assert torch.equal(part, wide[name].bfloat16())


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def recipe(base: Path, models: list[Any], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "smile",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": parameters,
    }


def test_which_tensors(tmp_path: Path) -> None:
    """Weights of linear layers and their biases; all else is the base's or the mean."""
    generator = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (30, 8),
        "model.layers.0.up_proj.weight": (12, 8),
        "model.layers.0.up_proj.bias": (12,),
        "model.layers.0.router.weight": (4, 8),
        "model.layers.0.norm.weight": (8,),
        "model.layers.0.norm.bias": (8,),
        "model.layers.0.experts.weight": (2, 5, 8),
        "model.layers.0.in_proj_weight": (6, 8),
        "lm_head.weight": (30, 8),
        "projection": (6, 8),
        "weight": (6, 8),
    }

    def draw() -> dict[str, np.ndarray]:
        return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}

    tensors = [draw() for _ in range(3)]
    base, *models = (write(tmp_path / str(i), each) for i, each in enumerate(tensors))
    api.merge(recipe(base, models, others="mean", k=2), tmp_path / "out")
    module = "model.layers.0"
    assert set(load_file(tmp_path / "out" / "tasks.safetensors")) == {
        f"{module}.up_proj.weight.smile.up",
        f"{module}.up_proj.weight.smile.down",
        f"{module}.up_proj.weight.smile.router",
        f"{module}.up_proj.bias.smile.dense",
        f"{module}.router.weight.smile.up",
        f"{module}.router.weight.smile.down",
        f"{module}.router.weight.smile.router",
    }
    kept = {f"{module}.up_proj.weight", f"{module}.up_proj.bias", f"{module}.router.weight"}
    for name, found in load_file(tmp_path / "out" / "model.safetensors").items():
        if name in kept:
            np.testing.assert_array_equal(found, tensors[0][name])
        else:
            mean = (tensors[1][name] + tensors[2][name]) / 2
            np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)
    assert len(open_smile(tmp_path / "out").modules) == 2
    described = json.loads((tmp_path / "out" / "smile.json").read_text())
    assert list(described["modules"]) == [f"{module}.router", f"{module}.up_proj"]
    assert described["modules"][f"{module}.up_proj"] == {
        "experts": [0, 1],
        "biases": [0, 1],
        "k": 2,
        "gate_k": 1,
        "top_k": 1,
        "routing_use_diff": True,
        "transposed": False,
    }
    plan = api.plan(recipe(base, models, preset="llama"))
    parts = {part.name: part.shape for job in plan.jobs for part in job.parts}
    weight = f"{module}.up_proj.weight.smile"
    assert parts == {
        f"{weight}.down": (2, 8, 8),
        f"{weight}.up": (2, 12, 8),
        f"{weight}.router": (2, 8, 8),
        f"{module}.up_proj.bias.smile.dense": (2, 12),
    }
    with pytest.raises(RecipeError, match="expected weights of linear layers"):
        api.plan(recipe(base, models, layers="nothing"))


def test_a_layer_that_nobody_changed(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.normal(size=(9, 7)).astype(np.float32) for name in ("a.weight", "b.weight")
    }
    base = write(tmp_path / "base", tensors)
    near = tensors["a.weight"] * 0
    near[2, 3] = 2e-9
    zero = {"a.weight": near * 0, "b.weight": tensors["b.weight"]}
    zeros = write(tmp_path / "zeros", zero)
    models = [write(tmp_path / "1", {**zero, "a.weight": near}), base]
    api.merge(recipe(zeros, models[:1]), tmp_path / "out")
    described = json.loads((tmp_path / "out" / "smile.json").read_text())
    assert described["modules"] == {}
    assert described["unchanged"] == ["a", "b"]
    # One model that changed it is enough; the others have experts of zeros.
    api.merge(recipe(zeros, models), tmp_path / "both")
    described = json.loads((tmp_path / "both" / "smile.json").read_text())
    assert list(described["modules"]) == ["a"]
    assert described["unchanged"] == ["b"]
    assert pymerge.verify(tmp_path / "both").ok


def test_non_finite_elements_are_counted(tmp_path: Path) -> None:
    base, (first, second) = problem((9, 7), num=2)
    second[0, 0] = np.nan
    tensors = [{"a.weight": each} for each in (base, first, second)]
    base_folder, *models = (write(tmp_path / str(i), each) for i, each in enumerate(tensors))
    report = api.merge(recipe(base_folder, models, k=3, gate_k=2), tmp_path / "out")
    # up, down and router of one expert
    assert report.nonfinite == {"a.weight": 3 * 9 + 3 * 7 + 2 * 7}
    report = api.merge(recipe(base_folder, models, k=0, gate_k=2), tmp_path / "dense")
    assert report.nonfinite == {"a.weight": 1 + 2 * 7}


def test_adapters(tmp_path: Path) -> None:
    """Of an adapter the expert is the product of its factors, scaled, as of the dense model."""
    generator = np.random.default_rng(5)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.05, shape).astype(np.float32)

    name = "model.layers.0.mlp.up_proj"
    weight = draw(70, 90)
    base = write(tmp_path / "base", {f"{name}.weight": weight})
    models, updates = [], []
    for number in range(2):
        folder = tmp_path / f"adapter{number}"
        folder.mkdir()
        left, right = draw(70, 4), draw(4, 90)
        updates.append(1.5 * left.astype(float) @ right)
        keys = {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
        save_file(
            {f"base_model.model.{key}": value for key, value in keys.items()},
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        models.append(f"{base}+{folder}")
    api.merge(recipe(base, models, k=4), tmp_path / "out")
    parts = load_file(tmp_path / "out" / "tasks.safetensors")
    found = {part.removeprefix(f"{name}.weight."): value for part, value in parts.items()}
    for expert, update in zip(products(found), updates, strict=True):
        assert np.abs(expert - update).max() < 1e-5 * np.abs(update).max()
