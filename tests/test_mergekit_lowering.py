"""What of mergekit's planned graph becomes which of our jobs, with stand-ins for its tasks.

mergekit itself is not needed here; tests/parity runs the real one.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pymerge.checkpoint import TensorEntry
from pymerge.errors import BackendError, RecipeError
from pymerge.formats import BF16, F16, F32, Format
from pymerge.integrations import mergekit, mergekit_methods
from pymerge.integrations.mergekit_files import STAGING, place_files
from pymerge.integrations.mergekit_graph import Lowering, find_method
from pymerge.integrations.mergekit_inputs import LeftToMergekit
from pymerge.integrations.mergekit_methods import ours
from pymerge.methods.stepwise.table import MODULES
from pymerge.plan.model import Job
from pymerge.recipe.names import MERGEKIT_METHODS


class Inputs:
    """Gives tensors by model instead of opening checkpoints."""

    def __init__(self, loaded_as: Format | None = None, **formats: Format) -> None:
        self.checkpoints: dict[str, Any] = {}
        self._loaded_as = loaded_as
        self._entries = {
            model: TensorEntry("w", format, (2, 3), Path(model), 0, 6 * format.num_bytes)
            for model, format in formats.items()
        }

    def entries(self, task: Any) -> tuple[dict[str, TensorEntry], Format | None]:
        return self._entries, self._loaded_as


class ExecuteMergeMethodTask(SimpleNamespace):
    """As mergekit names its own."""


ExecuteMergeMethodTask.__module__ = "mergekit.merge_methods.task_adapter"


def task(models: str, base: str | None, shared: Any = (), **of_models: Any) -> Any:
    return ExecuteMergeMethodTask(
        gather_tensors=None,
        model_order=tuple(models),
        base_model=base,
        parameters=dict(shared),
        input_parameters={model: of_models for model in models if model != base},
        dtype=None,
        out_dtype=None,
    )


def lowered(method: str, inputs: Inputs, made_by: Any, dtype: str | None = None) -> Job:
    found, numerics = find_method(method, "accurate", MERGEKIT_METHODS)
    return Lowering(found, numerics, inputs, 11).draft("w", made_by, dtype)  # type: ignore[arg-type]


def test_parameters_are_those_that_mergekit_resolved() -> None:
    shared = {"normalize": False, "rescale": True, "lambda": 0.5, "int8_mask": True}
    made_by = task("abc", "a", shared, weight=0.25, density=0.75)
    job = lowered("dare_ties", Inputs(a=BF16, b=BF16, c=BF16), made_by)
    assert (job.kind, job.base and job.base.file.name) == ("merge", "a")
    assert job.model_names == ("b", "c")
    assert job.model_numbers == (0, 1)
    assert job.parameters["lambda"] == 0.5
    assert job.parameters["seed"] == 11
    assert "int8_mask" not in job.parameters
    assert job.model_parameters == ({"weight": 0.25, "density": 0.75},) * 2


@pytest.mark.parametrize(
    ("loaded_as", "out", "dtype", "expected"),
    [
        (None, None, None, (F32, F32)),  # promotion of bfloat16 and float16
        (BF16, None, None, (BF16, BF16)),
        (BF16, None, "float32", (BF16, F32)),
        (None, "float16", None, (F32, F16)),
        (None, "float16", "torch.bfloat16", (F32, BF16)),
    ],
)
def test_formats(
    loaded_as: Format | None, out: str | None, dtype: str | None, expected: tuple[Format, Format]
) -> None:
    made_by = task("ab", None, {"normalize": True}, weight=1.0)
    made_by.out_dtype = out
    job = lowered("linear", Inputs(loaded_as, a=BF16, b=F16), made_by, dtype)
    assert (job.working, job.format) == expected
    assert job.base is None
    assert job.model_names == ("a", "b")


@pytest.mark.parametrize("scale", [None, 1.0])
def test_unscaled_passthrough_is_a_copy(scale: float | None) -> None:
    job = lowered("passthrough", Inputs(a=BF16), task("a", None, scale=scale), "float32")
    assert (job.kind, job.format) == ("copy", F32)


def test_unscaled_passthrough_is_rounded_by_a_format_in_between() -> None:
    job = lowered("passthrough", Inputs(BF16, a=F32), task("a", None), "float32")
    assert (job.kind, job.working, job.format) == ("merge", BF16, F32)


def test_a_parameter_that_only_mergekit_has_is_refused_by_our_maths() -> None:
    entry = SimpleNamespace(id="a", tensor=None)
    group = SimpleNamespace(entries=[entry], non_base=[entry], base=None)
    with pytest.raises(RecipeError, match="ties has the parameter 'halo' in this release"):
        mergekit_methods._merge(SimpleNamespace(name="ties"), group, {"halo": 2.0}, "accurate")


def test_a_base_alone_is_a_copy() -> None:
    job = lowered("task_arithmetic", Inputs(a=F32), task("a", "a"))
    assert (job.kind, job.models[0].file.name) == ("copy", "a")


@pytest.mark.parametrize(
    ("method", "made_by", "why"),
    [
        ("ties", task("ab", "a", weight=1.0, density=1.5), "density is at most 1"),
        ("ties", task("ab", "a", {"other": 3}, weight=1.0), "with the parameter other"),
        ("ties", task("ab", "a"), "without the parameter weight"),
        ("slerp", task("abc", "a", {"t": 0.5}), "slerp of 2 models"),
        ("linear", task("abcd", None, weight=1.0), "a model lacks"),
        ("linear", SimpleNamespace(), "made by SimpleNamespace"),
    ],
)
def test_what_is_left_to_mergekit(method: str, made_by: Any, why: str) -> None:
    with pytest.raises(LeftToMergekit, match=why):
        lowered(method, Inputs(a=F32, b=F32, c=F32), made_by)


def test_parameters_without_effect_in_mergekit_are_taken() -> None:
    made_by = task("ab", "a", {"rescale": False}, weight=1.0, density=0.5)
    assert lowered("task_arithmetic", Inputs(a=F32, b=F32), made_by).kind == "merge"


def test_our_methods_and_theirs() -> None:
    assert set(MODULES) == MERGEKIT_METHODS
    assert set(ours()).isdisjoint(MERGEKIT_METHODS)
    assert {"wudi", "tsv_m", "iso_c", "pcb", "magmax"} <= set(ours())
    assert {"tall_masks", "smile", "fisher", "regmean"}.isdisjoint(ours())
    assert find_method("magmax", "mergekit", MERGEKIT_METHODS)[1] == "accurate"
    assert find_method("linear", "mergekit", MERGEKIT_METHODS)[1] == "mergekit"
    with pytest.raises(LeftToMergekit, match="no method 'other'"):
        find_method("other", "accurate", MERGEKIT_METHODS)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)

    answer("0.1.5")
    assert mergekit.check_version() == "0.1.5"
    answer("0.1.4")
    with pytest.raises(BackendError, match=r"mergekit 0\.1\.4 is installed, pymerge knows 0\.1\.5"):
        mergekit.check_version()
    assert mergekit.check_version(force=True) == "0.1.4"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(BackendError, match="pip install mergekit=="):
        mergekit.check_version(force=True)


@pytest.mark.parametrize("num", [1, 2])
def test_files_get_mergekits_names_and_index(
    num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.5")
    staging = tmp_path / STAGING
    staging.mkdir()
    names = ["model.safetensors"]
    if num == 2:
        names = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
        (staging / "model.safetensors.index.json").touch()
    for name in names:
        save_file({f"of {name}": np.ones(5, np.float32)}, staging / name)
    place_files(tmp_path, "part")
    expected = [name.replace("model", "part") for name in names]
    index = tmp_path / "part.safetensors.index.json"
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*expected, *([index.name] if num == 2 else [])}
    assert [*load_file(tmp_path / expected[0])] == [f"of {names[0]}"]
    if num == 2:
        assert json.loads(index.read_text()) == {
            "metadata": {"total_size": 40, "mergekit_version": "0.1.5"},
            "weight_map": {f"of {name}": new for name, new in zip(names, expected, strict=True)},
        }
