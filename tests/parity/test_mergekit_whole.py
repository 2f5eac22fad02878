"""mergekit's ``run_merge`` replaced by our engine, compared with what mergekit's own writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

DRIVER = Path(__file__).with_name("drive_mergekit_backend.py")
#: Units in the last place of float32 at the largest element of a tensor.
ROUNDING = 8 * 2.0**-24

#: In braces the folder of a checkpoint.
TIES = """
    merge_method: ties
    base_model: {base}
    models:
      - model: {a}
        parameters: {weight: 0.6, density: [0.3, 0.8]}
      - {model: {b}, parameters: {weight: 0.3, density: 0.5}}
    parameters: {lambda: 0.9}
    dtype: float32
"""
DARE = """
    merge_method: dare_ties
    base_model: {base}
    models:
      - {model: {a}, parameters: {weight: 0.6, density: 0.5}}
      - {model: {b}, parameters: {weight: 0.3, density: 0.7}}
    dtype: float16
"""
SLICES = """
    merge_method: passthrough
    slices:
      - sources: [{model: {a}, layer_range: [0, 3]}]
      - sources: [{model: {b}, layer_range: [1, 4], parameters: {scale: 0.5}}]
    dtype: float32
"""
#: As TRL's callback writes it: every key, references as mappings, a number for a boolean.
MAPPINGS = """
    merge_method: ties
    slices: null
    models:
      - model: &a {model: {path: {a}, revision: null}, lora: null, override_architecture: null}
        parameters: {density: [1.0], weight: 1.0}
      - model: &b {model: {path: {b}, revision: null}, lora: null, override_architecture: null}
        parameters: {density: [1.0, 0.7, 0.1], weight: 1.0}
    parameters: {normalize: 1.0}
    base_model: *b
    dtype: float32
    tokenizer_source: null
    tokenizer: null
    chat_template: null
    out_dtype: null
"""
OURS = """
    merge_method: tsv_m
    base_model: {base}
    models: [{model: {a}}, {model: {b}}]
    dtype: float32
"""
WITHOUT_EFFECT = {"clone_tensors": True, "trust_remote_code": True, "write_threads": 2}
JOBS: list[dict[str, Any]] = [
    {"name": "ties", "recipe": TIES},
    {"name": "slices", "recipe": SLICES, "options": WITHOUT_EFFECT},
    {"name": "shards", "recipe": TIES, "options": {"out_shard_size": 100_000}},
    {"name": "bare", "recipe": TIES, "options": {"write_model_card": False}},
    {"name": "dare", "recipe": DARE, "numerics": "mergekit", "options": {"random_seed": 7}},
    {"name": "mappings", "recipe": MAPPINGS, "options": {"device": "auto", "cuda": False}},
    {"name": "cuda", "recipe": TIES, "options": {"cuda": True}},
    {"name": "pickles", "recipe": TIES, "options": {"safe_serialization": False}},
    {"name": "no-method", "recipe": TIES.replace("ties", "tise")},
    {"name": "wrong", "recipe": TIES.replace("0.5", "1.5")},
    {"name": "ours", "recipe": OURS},
]


class Merged(NamedTuple):
    """Where the driver wrote, and what was said."""

    out: Path
    said: str

    def tensors(self, side: str, name: str) -> dict[str, torch.Tensor]:
        folder = self.out / side / name
        assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()[-3000:]
        found: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            found |= load_file(path)
        return found

    def error(self, side: str, name: str) -> str:
        return (self.out / side / name / "error.txt").read_text().splitlines()[-1]

    def done(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / f"{name}.json").read_text())
        return found


@pytest.fixture(scope="module")
def merged(peers_python: Path, llamas: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    out = tmp_path_factory.mktemp("merged")
    jobs = []
    for job in JOBS:
        recipe = job["recipe"]
        for folder in llamas.iterdir():
            recipe = recipe.replace(f"{{{folder.name}}}", str(folder))
        jobs.append({**job, "recipe": recipe, "seam": "whole"})
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [peers_python, DRIVER, out / "jobs.json", out],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Merged(out, done.stderr)


@pytest.mark.parametrize("name", ["ties", "slices", "shards", "bare", "dare", "mappings"])
def test_tensors_are_mergekits(name: str, merged: Merged) -> None:
    """In its numerics, with torch's masks, to the bit."""
    expected, found = merged.tensors("plain", name), merged.tensors("ours", name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        if name == "dare":
            assert torch.equal(found[key], tensor), key
        bound = ROUNDING * float(tensor.double().abs().max())
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=bound)
    counts = {"merges": 1, "planned": 1, "tensors": len(expected), "left": {}, "whole": {}}
    assert merged.done(name) == counts


def test_options_decide_the_files(merged: Merged) -> None:
    ties, bare = merged.out / "ours" / "ties", merged.out / "ours" / "bare"
    theirs = merged.out / "plain" / "ties" / "mergekit_config.yml"
    assert (ties / "mergekit_config.yml").read_bytes() == theirs.read_bytes()
    assert (ties / "README.md").exists()
    assert not (bare / "mergekit_config.yml").exists()
    assert not (bare / "README.md").exists()
    shards = list((merged.out / "ours" / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = load_file(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 100_000 or len(tensors) == 1


def test_options_without_effect_are_said(merged: Merged) -> None:
    for name in WITHOUT_EFFECT:
        assert merged.said.count(f"--{name.replace('_', '-')} has no effect: ") == 1
    assert merged.said.count("has no effect: ") == len(WITHOUT_EFFECT)


def test_a_gpu_that_is_not_there_is_said(merged: Merged) -> None:
    """mergekit fails; "auto" in its options is "cuda" wherever torch has one."""
    assert (merged.out / "plain" / "cuda" / "error.txt").exists()
    assert merged.said.count("device cuda: pymerge chooses another backend: ") == 1
    expected, found = merged.tensors("ours", "ties"), merged.tensors("ours", "cuda")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_pickles_are_left_to_mergekit(merged: Merged) -> None:
    reason = "PyTorch files as output (--no-safe-serialization)"
    assert merged.done("pickles")["whole"] == {reason: 1}
    assert f"pymerge leaves this merge to mergekit: {reason}" in merged.said
    theirs, ours = (
        torch.load(merged.out / side / "pickles" / "pytorch_model.bin")
        for side in ("plain", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_method_that_nobody_has_is_mergekits_error(merged: Merged) -> None:
    assert merged.error("ours", "no-method") == merged.error("plain", "no-method")
    assert merged.done("no-method")["merges"] == 0


def test_what_we_refuse_is_an_error(merged: Merged) -> None:
    error = merged.error("ours", "wrong")
    assert error.startswith("pymerge.integrations.mergekit_whole.WrongRecipe: ")
    assert "density is at most 1, found 1.5" in error
    assert merged.done("wrong")["merges"] == 0
    assert not list((merged.out / "ours" / "wrong").glob("*.safetensors"))


def test_our_methods_are_planned_too(merged: Merged, llamas: Path, tmp_path: Path) -> None:
    """mergekit alone has no such method; the same recipe through our API gives the same bytes."""
    import pymerge

    assert "Unimplemented merge method" in merged.error("plain", "ours")
    models = [{"model": str(llamas / name)} for name in "ab"]
    recipe = {"merge_method": "tsv_m", "base_model": str(llamas / "base"), "models": models}
    pymerge.merge({**recipe, "dtype": "float32"}, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    found = merged.tensors("ours", "ours")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_program_that_has_imported_it_is_redirected(peers_python: Path) -> None:
    program = """
import types, sys
from mergekit import merge
from mergekit.scripts import bakllama
from pymerge.errors import RecipeError, PlanError
from pymerge.integrations import mergekit
from pymerge.integrations.mergekit_whole import WrongPlan, WrongRecipe

host, executor = merge.run_merge, merge.Executor
mergekit.redirect()
assert merge.run_merge is host and merge.Executor is not executor
mergekit.redirect(whole=True)
first = merge.run_merge
assert bakllama.run_merge is first is not host
from mergekit.scripts import layershuffle
assert layershuffle.run_merge is first
mergekit.redirect(whole=True, numerics="mergekit")
assert bakllama.run_merge is merge.run_merge is layershuffle.run_merge
assert merge.run_merge not in (first, host) and merge.run_merge.__wrapped__ is host
mergekit.redirect()
assert merge.run_merge is host and merge.Executor is not executor
mergekit.redirect(whole=True)
from mergekit.scripts import legacy
assert legacy.run_merge is merge.run_merge is not host
mergekit.restore()
assert legacy.run_merge is host
assert {merge.run_merge, bakllama.run_merge, layershuffle.run_merge} == {host}
assert merge.Executor is executor
assert issubclass(WrongRecipe, RecipeError) and issubclass(WrongRecipe, ValueError)
assert issubclass(WrongPlan, PlanError) and issubclass(WrongPlan, ValueError)
"""
    done = subprocess.run(
        [peers_python, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
