"""What emr and tall_masks write, and the models made of it, against transcriptions of the papers'
formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.errors import CheckpointError, PymergeError, RecipeError

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ULP = {torch.bfloat16: 2**-8, torch.float32: 2**-23, torch.float16: 2**-10}
SMALLEST = {torch.bfloat16: 2**-133, torch.float32: 2**-149, torch.float16: 2**-24}
METHODS = ["emr", "tall_masks"]

Array = np.ndarray[Any, Any]


def merge(recipe: dict[str, Any], out: Path, **options: Any) -> Path:
    pymerge.merge(recipe, out, **{"backend": "reference", **options})
    assert pymerge.verify(out).ok
    return out


def load(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        found |= load_file(path)
    return found


def task_vectors(tasks: Any, name: str) -> list[Array]:
    base = tasks.base_tensors[name].float()
    return [(each[name].float() - base).numpy().ravel() for each in tasks.tensors]


def bits(masks: torch.Tensor, num: int) -> Array:
    found = np.unpackbits(masks.numpy(), axis=1, bitorder="little").astype(bool)
    assert not found[:, num:].any()
    return found[:, :num]


def true_emr(taus: list[Array]) -> tuple[Array, Array]:
    """Elect, mask: the unified vector and the masks."""
    total = taus[0].copy()
    for tau in taus[1:]:
        total = total + tau
    sign = np.where(total > 0, 1.0, -1.0)
    agrees = np.stack([tau * sign > 0 for tau in taus])
    unified = sign * np.max(np.abs(taus) * agrees, axis=0)
    return unified, agrees


def true_tall(taus: list[Array], thresholds: list[float]) -> tuple[Array, Array]:
    total = taus[0].copy()
    for tau in taus[1:]:
        total = total + tau
    limits = np.float32(thresholds)
    pairs = zip(taus, limits, strict=True)
    return total, np.stack([np.abs(tau) > limit * np.abs(total - tau) for tau, limit in pairs])


def names_of(tasks: Any) -> list[str]:
    return [name for name, tensor in tasks.base_tensors.items() if tensor.is_floating_point()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [1, 3, 20])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_and_masks(
    make_tasks: Any, tmp_path: Path, method: str, num: int, dtype: torch.dtype
) -> None:
    tasks = make_tasks(num, dtype)
    out = merge(tasks.recipe(method), tmp_path / "out")
    beside = load(out, "tasks*.safetensors")
    assert set(beside) == {f"{n}.{part}" for n in names_of(tasks) for part in ("vector", "masks")}
    for name in names_of(tasks):
        taus = task_vectors(tasks, name)
        vector, masks = true_emr(taus) if method == "emr" else true_tall(taus, [0.4] * num)
        found = beside[f"{name}.vector"]
        assert found.dtype == dtype
        assert found.shape == tasks.base_tensors[name].shape
        expected = torch.from_numpy(vector.astype(np.float32)).to(dtype)
        assert torch.equal(found.reshape(-1), expected), name
        assert beside[f"{name}.masks"].dtype == torch.uint8
        np.testing.assert_array_equal(bits(beside[f"{name}.masks"], vector.size), masks)


def true_scales(tasks: Any, beside: dict[str, torch.Tensor], rescale: str) -> list[float]:
    """The authors' sum of means, or the paper's ratio of sums, of the vector as it is stored."""
    over, under = np.zeros(len(tasks.tensors)), np.zeros(len(tasks.tensors))
    for name in names_of(tasks):
        taus = np.stack(task_vectors(tasks, name)).astype(np.float64)
        if not taus.size:
            continue
        vector = np.abs(beside[f"{name}.vector"].double().numpy().ravel())
        kept = bits(beside[f"{name}.masks"], vector.size) * vector
        reduce = np.mean if rescale == "official" else np.sum
        over += reduce(np.abs(taus), axis=1)
        under += reduce(kept, axis=1)
    return list(over / under)


@pytest.mark.parametrize("rescale", ["official", "paper"])
def test_scales_of_emr(make_tasks: Any, tmp_path: Path, rescale: str) -> None:
    tasks = make_tasks(3)
    parameters = {} if rescale == "official" else {"rescale": rescale}
    out = merge(tasks.recipe("emr", **parameters), tmp_path / "out")
    described = json.loads((out / "tasks.json").read_text())
    found = [task["scale"] for task in described["tasks"]]
    truth = true_scales(tasks, load(out, "tasks*.safetensors"), rescale)
    np.testing.assert_allclose(found, truth, rtol=1e-12)
    other = true_scales(
        tasks,
        load(out, "tasks*.safetensors"),
        "paper" if rescale == "official" else "official",
    )
    assert not np.allclose(found, other, rtol=1e-4)
    assert described["method"] == "emr"
    assert described["format"] == 1
    assert [task["name"] for task in described["tasks"]] == [str(f) for f in tasks.folders]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_task_models(make_tasks: Any, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """Base + scale * mask * vector in float64, within one rounding, all from the inputs."""
    tasks = make_tasks(3, dtype)
    thresholds = [0.3, 0.4, 0.5]
    recipe = tasks.recipe(method)
    if method == "tall_masks":
        for model, threshold in zip(recipe["models"], thresholds, strict=True):
            model["parameters"] = {"lambda_t": threshold}
    out = merge(recipe, tmp_path / "out")
    described = json.loads((out / "tasks.json").read_text())
    for number, folder in enumerate(tasks.folders):
        model = pymerge.load_task(out, str(folder), backend="reference")
        assert list(model) == list(load_names(out))
        for name in names_of(tasks):
            taus = task_vectors(tasks, name)
            vector, masks = true_emr(taus) if method == "emr" else true_tall(taus, thresholds)
            scale = described["tasks"][number]["scale"]
            base = tasks.base_tensors[name].double().numpy().ravel()
            truth = base + scale * masks[number] * vector
            # One rounding of the vector, one of the result.
            bound = ULP[dtype] * (np.abs(vector) + np.abs(truth)) + SMALLEST[dtype]
            found = model[name].double().numpy().ravel()
            assert model[name].dtype == dtype
            assert np.all(np.abs(found - truth) <= bound), name
        assert torch.equal(model["model.positions"], torch.arange(5))


def load_names(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder, "model*.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_one_task_comes_back(make_tasks: Any, tmp_path: Path, method: str, dtype: Any) -> None:
    """Of a single model every change is in the vector, and the scale is 1 up to its rounding."""
    tasks = make_tasks(1, dtype)
    out = merge(tasks.recipe(method), tmp_path / "out")
    model = pymerge.load_task(out, 0, backend="reference")
    for name in names_of(tasks):
        wanted, base = tasks.tensors[0][name].float(), tasks.base_tensors[name].float()
        bound = ULP[dtype] * (wanted.abs() + (wanted - base).abs()) * 1.01 + SMALLEST[dtype]
        assert torch.all((model[name].float() - wanted).abs() <= bound), name


@pytest.mark.parametrize("method", METHODS)
def test_folder_loads_as_the_base(make_tasks: Any, tmp_path: Path, method: str) -> None:
    tasks = make_tasks(3)
    out = merge(tasks.recipe(method), tmp_path / "out", shard_size="8KB")
    assert len(list(out.glob("tasks-*-of-*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tasks.base_tensors)
    found = load(out, "model-*.safetensors")
    for name, tensor in tasks.base_tensors.items():
        assert torch.equal(found[name], tensor), name
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    # The folder is a base for a further merge.
    models = [{"model": str(tasks.folders[0]), "parameters": {"weight": 1.0}}]
    again = {"merge_method": "task_arithmetic", "base_model": str(out), "models": models}
    merge(again, tmp_path / "again")
    for name in names_of(tasks):
        found = load_names(tmp_path / "again")
        assert torch.equal(found[name], tasks.tensors[0][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_tiles(make_tasks: Any, tmp_path: Path, method: str) -> None:
    tasks = make_tasks(20)
    outs = [
        merge(tasks.recipe(method), tmp_path / f"out-{i}", memory=memory, threads=threads)
        for i, (memory, threads) in enumerate((("160MiB", 1), ("2GiB", 3)))
    ]
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("method", METHODS)
def test_in_memory(make_tasks: Any, tmp_path: Path, method: str) -> None:
    """One tensor alone: the same vector and masks; the scale as if it were the whole model."""
    tasks = make_tasks(3, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = [each[name] for each in tasks.tensors]
    found = pymerge.merge_tensor(method, tasks.base_tensors[name], tensors, backend="reference")
    out = merge(tasks.recipe(method), tmp_path / "out")
    beside = load(out, "tasks*.safetensors")
    assert torch.equal(found.vector, beside[f"{name}.vector"])
    assert torch.equal(found.masks, beside[f"{name}.masks"])
    assert found.scales.shape == (3,)
    if method == "emr":
        whole = np.abs(np.stack([(t - tasks.base_tensors[name]).double() for t in tensors]))
        kept = bits(found.masks, whole[0].size) * found.vector.double().abs().numpy().ravel()
        truth = whole.reshape(3, -1).sum(axis=1) / kept.sum(axis=1)
        np.testing.assert_allclose(found.scales, truth, rtol=1e-12)
    else:
        assert found.scales.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_task_without_a_tensor_has_the_base_there(
    make_tasks: Any, save_model: Any, tmp_path: Path, method: str
) -> None:
    tasks = make_tasks(3)
    name = "model.layers.0.mlp.up_proj.weight"
    shutil.rmtree(tasks.folders[1])
    save_model(tasks.folders[1], {n: t for n, t in tasks.tensors[1].items() if n != name})
    out = merge(tasks.recipe(method), tmp_path / "out", allow_missing=True)
    assert json.loads((out / "tasks.json").read_text())["rows"] == {name: [0, 2]}
    models = [pymerge.load_task(out, number, backend="reference") for number in range(3)]
    assert torch.equal(models[1][name], tasks.base_tensors[name])
    assert not torch.equal(models[0][name], tasks.base_tensors[name])
    assert not torch.equal(models[2][name], models[0][name])
    assert not torch.equal(models[1]["lm_head.weight"], tasks.base_tensors["lm_head.weight"])


def test_unchanged_task_is_the_base(make_tasks: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    shutil.copy(tasks.base / "model.safetensors", tasks.folders[1] / "model.safetensors")
    out = merge(tasks.recipe("emr"), tmp_path / "out")
    assert json.loads((out / "tasks.json").read_text())["tasks"][1]["scale"] == 1.0
    model = pymerge.load_task(out, 1, backend="reference")
    for name, tensor in tasks.base_tensors.items():
        assert torch.equal(model[name], tensor), name


def test_scale_of_nan_is_refused(make_tasks: Any, save_model: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    tasks.tensors[1]["lm_head.weight"][3, 4] = float("nan")
    shutil.rmtree(tasks.folders[1])
    save_model(tasks.folders[1], tasks.tensors[1])
    with pytest.raises(PymergeError, match=r"scale of task .*task-1 is not finite.*--check"):
        pymerge.merge(tasks.recipe("emr"), tmp_path / "out", backend="reference")
    with pytest.raises(CheckpointError):
        pymerge.load_task(tmp_path / "out", 0)


def test_scales_need_one_rule(make_tasks: Any) -> None:
    recipe = make_tasks(2).recipe("emr")
    recipe["parameters"] = {
        "rescale": [{"filter": "lm_head", "value": "paper"}, {"value": "official"}]
    }
    with pytest.raises(RecipeError, match="rescale must be the same"):
        pymerge.plan(recipe, backend="reference")


def test_resumed_merge_is_left_as_it_is(make_tasks: Any, tmp_path: Path) -> None:
    """A finished folder is recognised although tasks.json is known only after a merge."""
    tasks = make_tasks(2)
    out = merge(tasks.recipe("emr"), tmp_path / "out")
    assert pymerge.merge(tasks.recipe("emr"), out, backend="reference").done_before
    (out / "tasks.json").write_text((out / "tasks.json").read_text().replace("0.", "0.0", 1))
    with pytest.raises(PymergeError, match="overwrite"):
        pymerge.merge(tasks.recipe("emr"), out, backend="reference")


def test_overwriting_leaves_no_task_behind(make_tasks: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    out = merge(tasks.recipe("emr"), tmp_path / "out", shard_size="8KB")
    other = tasks.recipe("task_arithmetic")
    for model in other["models"]:
        model["parameters"] = {"weight": 1.0}
    with pytest.raises(PymergeError, match="overwrite"):
        pymerge.merge(other, out, backend="reference")
    merge(other, out, overwrite=True)
    assert not list(out.glob("tasks*"))


def test_task_shards_are_verified(make_tasks: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    out = merge(tasks.recipe("emr"), tmp_path / "out")
    with (out / "tasks.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    report = pymerge.verify(out)
    assert not report.ok
    assert "tasks.safetensors" in report.problems[0]
