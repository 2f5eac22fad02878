"""Models with LoRA adapters through whole merges, against W + s B A in float64.

The updates are computed in float32: each of the rank's products and sums rounds once, and W + s B A
once more, so a result may differ from the truth by that many roundings of its largest term; then it
is rounded to the output's format once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.checkpoint import open_checkpoint
from pymerge.engine import updates
from pymerge.plan import memory

Arrays = dict[str, np.ndarray]

RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK
EPSILON = 2.0**-24
#: name -> shape in the base; "out_in" is stored as a Linear's, "in_out" as a Conv1D's.
SHAPES = {
    "model.embed_tokens.weight": (61, 40),
    "model.layers.0.out_in.weight": (70, 130),
    "model.layers.0.out_in.bias": (70,),
    "model.layers.0.in_out.weight": (130, 70),
    "model.layers.0.conv.weight": (12, 5, 3, 3),
    "model.layers.0.norm.weight": (40,),
    "lm_head.weight": (61, 40),
}
LONG = 4096 * 3


def normal(seed: int, *shape: int, scale: float = 0.05) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def write_base(folder: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def base_tensors() -> Arrays:
    return {name: normal(i, *shape, scale=1) for i, (name, shape) in enumerate(SHAPES.items())}


def adapter_tensors(seed: int = 50) -> Arrays:
    layer = "model.layers.0"
    return {
        f"{layer}.out_in.lora_A.weight": normal(seed, RANK, 130),
        f"{layer}.out_in.lora_B.weight": normal(seed + 1, 70, RANK),
        f"{layer}.out_in.lora_B.bias": normal(seed + 2, 70),
        f"{layer}.in_out.lora_A.weight": normal(seed + 3, RANK, 130),
        f"{layer}.in_out.lora_B.weight": normal(seed + 4, 70, RANK),
        f"{layer}.conv.lora_A.weight": normal(seed + 5, RANK, 5, 3, 3),
        f"{layer}.conv.lora_B.weight": normal(seed + 6, 12, RANK, 1, 1),
        "model.embed_tokens.lora_embedding_A": normal(seed + 7, RANK, 61),
        "model.embed_tokens.lora_embedding_B": normal(seed + 8, 40, RANK),
        f"{layer}.norm.weight": normal(seed + 9, 40),
    }


def magnitudes(seed: int = 90) -> Arrays:
    layer = "model.layers.0"
    return {
        f"{layer}.out_in.lora_magnitude_vector": 1 + normal(seed, 70),
        f"{layer}.in_out.lora_magnitude_vector": 1 + normal(seed + 1, 70),
        f"{layer}.conv.lora_magnitude_vector": 1 + normal(seed + 2, 1, 12, 1, 1),
        "model.embed_tokens.lora_magnitude_vector": 1 + normal(seed + 3, 40),
    }


def merged(base: Arrays, adapter: Arrays, scale: float = SCALE) -> dict[str, np.ndarray]:
    """The truth in float64, written from the definition: module after module, as PEFT stores it."""
    found = {name: value.astype(np.float64) for name, value in base.items()}
    wide = {name: value.astype(np.float64) for name, value in adapter.items()}
    for name, value in wide.items():
        if name in found:
            found[name] = value
    for name in list(found):
        module, _, part = name.rpartition(".")
        if part == "bias" and f"{module}.lora_B.bias" in wide:
            found[name] = found[name] + scale * wide[f"{module}.lora_B.bias"]
        weight = found[name]
        m = wide.get(f"{module}.lora_magnitude_vector")
        if part != "weight":
            continue
        if f"{module}.lora_embedding_A" in wide:
            a, b = wide[f"{module}.lora_embedding_A"], wide[f"{module}.lora_embedding_B"]
            weight = weight + scale * (b @ a).T
            outputs: tuple[int, ...] = (
                0,
            )  # summed for the norm of each of the embedding's columns
        elif f"{module}.lora_A.weight" in wide:
            a, b = wide[f"{module}.lora_A.weight"], wide[f"{module}.lora_B.weight"]
            delta = np.tensordot(b.reshape(len(b), -1), a, 1)
            turned = "in_out" in module
            weight = weight + scale * (delta.T if turned else delta)
            outputs = (0,) if turned else tuple(range(1, weight.ndim))
        else:
            continue
        if m is not None:
            norm = np.sqrt((weight**2).sum(axis=outputs, keepdims=True))
            weight = weight * m.reshape(norm.shape) / norm
        found[name] = weight
    return found


def close(found: np.ndarray, truth: np.ndarray, largest: float, roundings: int) -> None:
    error = np.abs(found.astype(np.float64) - truth).max()
    assert error <= roundings * EPSILON * largest, error


class Case:
    """A base and two adapters on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = base_tensors()
        self.adapters = [adapter_tensors(50), {**adapter_tensors(70), **magnitudes()}]
        self.base_path = write_base(folder / "base", self.base)
        self.paths = [
            write_adapter(folder / "plain", self.adapters[0]),
            write_adapter(folder / "dora", self.adapters[1], use_dora=True),
        ]
        self.models = [f"{self.base_path}+{path}" for path in self.paths]

    def recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        given = {"weight": 0.5, **({"density": 0.4} if method == "ties" else {})}
        entries = [{"model": model, "parameters": given} for model in self.models]
        found: dict[str, Any] = {"merge_method": method, "models": entries}
        if method != "linear":
            found["base_model"] = str(self.base_path)
        return found | ({"parameters": parameters} if parameters else {})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("adapters"))


def alone(model: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": model}], **more}


@pytest.mark.parametrize("number", [0, 1], ids=["lora", "dora"])
def test_a_model_with_its_adapter(case: Case, tmp_path: Path, number: int) -> None:
    pymerge.merge(alone(case.models[number]), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    truth = merged(case.base, case.adapters[number])
    assert found.keys() == case.base.keys()
    for name, value in found.items():
        assert value.dtype == np.float32
        assert value.shape == case.base[name].shape
        close(value, truth[name], 4.0, RANK + 4)
    assert np.array_equal(found["lm_head.weight"], case.base["lm_head.weight"])
    replaced = case.adapters[number]["model.layers.0.norm.weight"]
    assert np.array_equal(found["model.layers.0.norm.weight"], replaced)
    changed = [name for name in found if not np.array_equal(found[name], case.base[name])]
    assert len(changed) == 6


def test_adapters_merge_like_the_models_that_they_make(
    case: Case, tmp_path: Path, digests: Any
) -> None:
    """One rounding in all: the same bytes as from models that were merged in float32 before."""
    for number, model in enumerate(case.models):
        pymerge.merge(alone(model), tmp_path / f"whole{number}")
    for method in ("linear", "task_arithmetic", "ties"):
        recipe = case.recipe(method)
        pymerge.merge({**recipe, "dtype": "bfloat16"}, tmp_path / method)
        for number, entry in enumerate(recipe["models"]):
            entry["model"] = str(tmp_path / f"whole{number}")
        pymerge.merge({**recipe, "dtype": "bfloat16"}, tmp_path / f"{method}-whole")
        expected = digests(tmp_path / f"{method}-whole")["model.safetensors"]
        assert digests(tmp_path / method)["model.safetensors"] == expected


def test_the_base_is_read_once_for_all_of_its_adapters(case: Case) -> None:
    plan = pymerge.plan(case.recipe("linear"))
    job = next(job for job in plan.jobs if job.name.endswith("out_in.weight"))
    assert len(job.sources) == 1
    assert len(job.updates) == 2
    assert job.num_inputs == 3
    assert job.source_bytes == case.base[job.name].nbytes
    plain = pymerge.plan(alone(str(case.base_path)))
    norms = sum(job.once_bytes for job in plan.jobs)
    replaced = 2 * case.base["model.layers.0.norm.weight"].nbytes
    assert plan.bytes_read == plain.bytes_read + norms + replaced - replaced // 2
    assert pymerge.plan(case.recipe("task_arithmetic")).jobs[1].num_inputs == 3


def test_formats_are_the_bases_and_round_once(
    tmp_path: Path, save: Any, as_bf16: Callable[..., Any]
) -> None:
    weight, layer = normal(1, 24, 40, scale=1), "model.layers.0.up"
    base = save(tmp_path / "base", {f"{layer}.weight": as_bf16(weight), "n": as_bf16(weight[0])})
    stored = as_bf16(weight)
    exact = (np.frombuffer(stored.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    tensors = {
        f"{layer}.lora_A.weight": normal(2, RANK, 40),
        f"{layer}.lora_B.weight": normal(3, 24, RANK),
        "n": normal(4, 40),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    pymerge.merge(alone(f"{base}+{adapter}"), tmp_path / "out")
    pymerge.merge(alone(f"{base}+{adapter}", dtype="float32"), tmp_path / "wide")
    wide = load_file(tmp_path / "wide/model.safetensors")[f"{layer}.weight"]
    b, a = tensors[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_A.weight"]
    delta = SCALE * b.astype(np.float64) @ a
    close(wide, exact.reshape(24, 40) + delta, 4.0, RANK + 2)
    opened = open_checkpoint(str(tmp_path / "out"))
    assert {entry.format.name for entry in opened.tensors.values()} == {"BF16"}
    entry = opened.tensors[f"{layer}.weight"]
    data = entry.file.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert data == rounded.tobytes()


@pytest.mark.parametrize("format", ["F16", "BF16", "F64"])
def test_matrices_of_other_formats(
    case: Case, tmp_path: Path, save: Any, as_bf16: Any, raw: Any, format: str
) -> None:
    weight, layer = normal(1, 24, 40, scale=1), "model.layers.0.up"
    base = write_base(tmp_path / "base", {f"{layer}.weight": weight})
    a, b = np.round(normal(2, RANK, 40) * 256) / 256, np.round(normal(3, 24, RANK) * 256) / 256
    named = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    folder = write_adapter(tmp_path / "wide", named)
    numpy_type = {"F16": np.float16, "F64": np.float64}
    tensors = {
        f"base_model.model.{name}": as_bf16(value)
        if format == "BF16"
        else raw(format, value.shape, value.astype(numpy_type[format]).tobytes())
        for name, value in named.items()
    }
    other = save(tmp_path / "other", tensors)
    (other / "model.safetensors").rename(other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    (other / "config.json").unlink()
    for path in (folder, other):
        pymerge.merge(alone(f"{base}+{path}"), tmp_path / f"out-{path.name}")
    found = [load_file(tmp_path / f"out-{path.name}/model.safetensors") for path in (folder, other)]
    assert np.array_equal(found[0][f"{layer}.weight"], found[1][f"{layer}.weight"])


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks that hold two spans of float32, so that the tensors have many tiles."""
    patch.setattr(memory, "LARGEST_BLOCK", 2 * 4096 * 4 + 8192)
    patch.setattr(memory, "SMALLEST_BLOCK", 1)


@pytest.mark.parametrize(
    "recipe", ["linear", "ties", "ties-model", "passthrough"], ids=lambda name: name
)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_do_not_depend_on_tiles_threads_and_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any, recipe: str, threads: int
) -> None:
    shapes = {"a.out_in.weight": (3, LONG), "b.in_out.weight": (150, 70), "c.t.weight": (90, 97)}
    base = {name: normal(i, *shape, scale=1) for i, (name, shape) in enumerate(shapes.items())}
    adapter = {
        "a.out_in.lora_A.weight": normal(10, RANK, LONG),
        "a.out_in.lora_B.weight": normal(11, 3, RANK),
        "a.out_in.lora_magnitude_vector": normal(12, 3),
        "b.in_out.lora_A.weight": normal(13, RANK, 150),
        "b.in_out.lora_B.weight": normal(14, 70, RANK),
        "b.in_out.lora_magnitude_vector": normal(15, 70),
        "c.t.lora_A.weight": normal(16, RANK, 97),
        "c.t.lora_B.weight": normal(17, 90, RANK),
        "c.t.lora_magnitude_vector": normal(18, 90),
    }
    folder = write_base(tmp_path / "base", base)
    tuned = write_adapter(tmp_path / "adapter", adapter, use_dora=True)
    model = f"{folder}+{tuned}"
    given: dict[str, Any] = alone(model)
    if recipe != "passthrough":
        entries = [{"model": model, "parameters": {"weight": 0.7, "density": 0.3}}]
        given = {"merge_method": recipe.partition("-")[0], "models": entries}
        if recipe == "linear":
            entries[0]["parameters"] = {"weight": 0.7}
        else:
            given["base_model"] = str(folder)
            given["parameters"] = {"trim_scope": "model"} if recipe == "ties-model" else {}
    api.merge(given, tmp_path / "whole", memory="1GiB", threads=1)
    small_blocks(monkeypatch)
    plan = api.plan(given, memory="160MiB", threads=threads)
    assert max(plan.tiling.num_tiles(job) for job in plan.jobs) >= 5
    api.merge(plan, tmp_path / "tiles")
    assert digests(tmp_path / "tiles") == digests(tmp_path / "whole")
    if recipe == "passthrough":
        truth = merged(base, adapter)
        for name, value in load_file(tmp_path / "tiles/model.safetensors").items():
            close(value, truth[name], 4.0, RANK + 4)


@pytest.mark.parametrize("columns", [4099, 2 * 4099, 3 * 8209])
def test_norms_of_rows_that_no_span_divides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any, columns: int
) -> None:
    """A few sums a row, not one for each of its elements, wherever tiles end."""
    base = {"a.up.weight": normal(0, 7, columns, scale=1)}
    adapter = {
        "a.up.lora_A.weight": normal(1, RANK, columns),
        "a.up.lora_B.weight": normal(2, 7, RANK),
        "a.up.lora_magnitude_vector": normal(3, 7),
    }
    tuned = write_adapter(tmp_path / "adapter", adapter, use_dora=True)
    recipe = alone(f"{write_base(tmp_path / 'base', base)}+{tuned}")
    added: list[int] = []
    exact_sum = updates._exact_sum

    def counted(values: list[float]) -> float:
        added.append(len(values))
        return exact_sum(values)

    monkeypatch.setattr(updates, "_exact_sum", counted)
    api.merge(recipe, tmp_path / "whole", memory="1GiB", threads=1)
    assert added == [-(-columns // 4096)] * 7
    small_blocks(monkeypatch)
    api.merge(recipe, tmp_path / "tiles", memory="160MiB", threads=3)
    assert digests(tmp_path / "tiles") == digests(tmp_path / "whole")
    found = load_file(tmp_path / "tiles/model.safetensors")["a.up.weight"]
    close(found, merged(base, adapter)["a.up.weight"], 4.0, RANK + 4)


def test_zero_rows_and_infinite_weights(tmp_path: Path) -> None:
    """A norm of 0 gives what 0 * m / 0 is, NaN, and does not stop the merge."""
    weight = normal(1, 3, 8)
    weight[1] = 0
    weight[2, 3] = np.inf
    base = write_base(tmp_path / "base", {"a.weight": weight})
    tensors = {
        "a.lora_A.weight": normal(2, RANK, 8),
        "a.lora_B.weight": np.zeros((3, RANK), np.float32),
        "a.lora_magnitude_vector": np.ones(3, np.float32),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, use_dora=True)
    report = pymerge.merge(alone(f"{base}+{adapter}"), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")["a.weight"]
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[2, 3])
    assert report.nonfinite == {"a.weight": 9}


def test_the_plan_knows_the_adapters(case: Case, tmp_path: Path) -> None:
    plan = pymerge.plan(alone(case.models[0]))
    assert pymerge.plan(alone(case.models[0])).hash == plan.hash
    changed = Case(tmp_path)
    hashes = {pymerge.plan(alone(changed.models[0])).hash}
    config = changed.paths[0] / "adapter_config.json"
    config.write_text(config.read_text().replace("6.0", "7.0"))
    hashes.add(pymerge.plan(alone(changed.models[0])).hash)
    config.write_text(config.read_text().replace("7.0", "6.0"))
    tensors = adapter_tensors(51)
    for name in ("tensors", "time"):
        target = changed.paths[0] / "adapter_model.safetensors"
        named = {f"base_model.model.{key}": value for key, value in tensors.items()}
        save_file(named, target, {"format": "pt", "step": name})
        hashes.add(pymerge.plan(alone(changed.models[0])).hash)
    assert len(hashes) == 4
    assert "lora_add" in plan.ops.backends
    assert "gram_n" not in plan.ops.backends
    assert "gram_n" in pymerge.plan(alone(case.models[1])).ops.backends
    assert "lora_add" not in pymerge.plan(alone(str(case.base_path))).ops.backends


def test_the_manifest_and_the_model_card_name_the_adapter(case: Case, tmp_path: Path) -> None:
    pymerge.merge(alone(case.models[0]), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/pymerge_manifest.json").read_text())
    files = [file["name"] for model in manifest["inputs"] for file in model["files"]]
    assert files == ["model.safetensors", "adapter_model.safetensors"]
    assert pymerge.verify(tmp_path / "out").ok
    assert "plain" in (tmp_path / "out/README.md").read_text()


def test_an_adapter_that_changes_during_the_merge(tmp_path: Path) -> None:
    case = Case(tmp_path / "models") if (tmp_path / "models").mkdir() is None else None
    assert case is not None
    plan = pymerge.plan(alone(case.models[0]))
    target = case.paths[0] / "adapter_model.safetensors"
    target.touch()
    with pytest.raises(pymerge.StorageError, match=r"adapter_model\.safetensors changed"):
        pymerge.merge(plan, tmp_path / "out")


def test_matrices_are_part_of_the_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pymerge.plan(case.recipe("linear"), memory="512MiB")
    sizes = sorted((job.update_bytes for job in plan.jobs), reverse=True)
    assert plan.tiling.update_bytes == sum(sizes[:3])
    plain = pymerge.plan(alone(str(case.base_path)), memory="512MiB")
    assert plain.tiling.update_bytes == 0
    assert plan.tiling.overhead == plain.tiling.overhead + sum(sizes[:3])
    assert plan.tiling.arena_bytes + plan.tiling.overhead <= plan.tiling.memory
    monkeypatch.setattr(memory, "UPDATE_SHARE", 1 << 40)
    tight = pymerge.plan(case.recipe("linear"), memory="512MiB")
    assert tight.tiling.update_bytes == sizes[0]
    monkeypatch.setattr(memory, "SMALLEST_ARENA", (512 << 20) - (160 << 20))
    monkeypatch.setattr(type(plan.jobs[0]), "update_bytes", property(lambda job: 40 << 20))
    with pytest.raises(pymerge.PlanError, match=r"adapters' matrices .* give at least") as caught:
        pymerge.plan(case.recipe("linear"), memory="512MiB")
    needed = str(caught.value).rpartition("at least ")[2].removesuffix(" MiB")
    assert pymerge.plan(case.recipe("linear"), memory=f"{needed}MiB")


def test_jobs_wait_for_each_others_matrices(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any
) -> None:
    """With room for the largest job's alone, lanes take turns; looks at the whole model too."""
    for name, recipe in (
        ("linear", case.recipe("linear")),
        ("model", case.recipe("ties", trim_scope="model")),
    ):
        pymerge.merge(recipe, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "UPDATE_SHARE", 1 << 40)
            small_blocks(patch)
            pymerge.merge(recipe, tmp_path / f"{name}-turns", memory="160MiB", threads=3)
        assert digests(tmp_path / name) == digests(tmp_path / f"{name}-turns")


def test_the_mapping_form_and_a_lone_adapter(
    case: Case, tmp_path: Path, digests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "text"
    pymerge.merge(alone(case.models[0]), expected)
    mapping = {"model": str(case.base_path), "lora": {"path": str(case.paths[0])}}
    lone = write_adapter(
        tmp_path / "lone", case.adapters[0], base_model_name_or_path=str(case.base_path)
    )
    for name, model in (("mapping", mapping), ("lone", str(lone))):
        pymerge.merge(
            {"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / f"out-{name}"
        )
        key = "model.safetensors"
        assert digests(tmp_path / f"out-{name}")[key] == digests(expected)[key]


def test_a_warning_and_an_error_reach_the_user(case: Case, tmp_path: Path) -> None:
    other = write_adapter(
        tmp_path / "other", case.adapters[0], base_model_name_or_path="owner/elsewhere"
    )
    plan = pymerge.plan(alone(f"{case.base_path}+{other}"))
    assert any("owner/elsewhere" in sentence for sentence in plan.warnings)
    wrong = write_adapter(tmp_path / "wrong", {"x.lora_A.weight": normal(1, RANK, 3)})
    with pytest.raises(pymerge.CheckpointError, match=r"models\[0\].*x\.lora_A\.weight"):
        pymerge.plan(alone(f"{case.base_path}+{wrong}"))


def test_layers_of_a_model_with_an_adapter_are_sliced(case: Case, tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": case.models[0], "layer_range": [0, 1]}]},
        {"sources": [{"model": str(case.base_path), "layer_range": [0, 1]}]},
    ]
    (case.base_path / "config.json").write_text('{"num_hidden_layers": 1}')
    pymerge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    truth = merged(case.base, case.adapters[0])
    name = "out_in.weight"
    close(found[f"model.layers.0.{name}"], truth[f"model.layers.0.{name}"], 4.0, RANK + 2)
    assert np.array_equal(found[f"model.layers.1.{name}"], case.base[f"model.layers.0.{name}"])


def test_a_merge_with_adapters_resumes(
    case: Case, tmp_path: Path, digests: Any, stop_after: Any
) -> None:
    recipe = case.recipe("ties")
    pymerge.merge(recipe, tmp_path / "whole")
    with stop_after(3):
        pymerge.merge(recipe, tmp_path / "out")
    report = pymerge.merge(recipe, tmp_path / "out")
    assert report.num_resumed == 3
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
