"""RAM and RAM+ through mergekit 0.1.5 and through pymerge: every element within one unit in the
last place of the larger of base and result. RAM+'s factors may be two units apart as well, since
mergekit rounds them to float32 at each of three steps and pymerge once.

The thresholds are so large that a part of the elements is changed by no model, by one and by
several, which the test checks.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pymerge

DRIVER = Path(__file__).with_name("drive_mergekit.py")

#: Method and its parameters; {model} stands for the three fine-tuned models.
RECIPES = {
    "ram": "merge_method: ram\nparameters: {epsilon: 0.002}",
    "ram-default": "merge_method: ram",
    "ramplus": "merge_method: ramplus_tl\nparameters: {epsilon: 0.002}",
    "ramplus-bounded": "merge_method: ramplus_tl\nparameters: {epsilon: 0.002, r: 0.5, alpha: 1.0}",
    "ramplus-not-bounded": "merge_method: ramplus_tl\n"
    "parameters: {epsilon: 0.0035, r: 0.3, alpha: 5.0}",
    # Next to no element is changed by one model alone.
    "ramplus-default": "merge_method: ramplus_tl",
}


@pytest.fixture(scope="module")
def outputs(
    peers_python: Path, llamas: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Name → mergekit's folder and ours."""
    work = tmp_path_factory.mktemp("parity-ram")
    jobs, found = [], {}
    for name, text in RECIPES.items():
        recipe = work / f"{name}.yaml"
        models = "".join(f"  - model: {llamas / model}\n" for model in ("a", "b", "c"))
        recipe.write_text(
            f"{text}\nbase_model: {llamas / 'base'}\nmodels:\n{models}dtype: float32\n"
        )
        found[name] = (work / "theirs" / name, work / "ours" / name)
        jobs.append({"recipe": str(recipe), "out": str(found[name][0])})
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    subprocess.run([peers_python, DRIVER, work / "jobs.json"], check=True, env=environment)
    for job, (_, ours) in zip(jobs, found.values(), strict=True):
        pymerge.merge(job["recipe"], ours)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_agrees_to_the_last_place(
    outputs: dict[str, tuple[Path, Path]], llamas: Path, name: str
) -> None:
    theirs, ours = (tensors(folder) for folder in outputs[name])
    base = tensors(llamas / "base")
    assert theirs.keys() == ours.keys()
    for key, expected in theirs.items():
        found = ours[key]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        size = np.maximum(base[key].abs().numpy(), expected.abs().numpy())
        bound = np.spacing(size).astype(np.float64)
        if name.startswith("ramplus"):
            bound += 2 * np.spacing((expected - base[key]).abs().numpy())
        error = np.abs(found.double().numpy() - expected.double().numpy())
        assert np.all(error <= bound), f"{key}: {np.max(error / np.spacing(size))} units"


def test_thresholds_leave_elements_of_every_kind(llamas: Path) -> None:
    base, *tuned = (tensors(llamas / name) for name in ("base", "a", "b", "c"))
    key = "model.embed_tokens.weight"
    for epsilon in (0.002, 0.0035):
        count = sum((each[key] - base[key]).abs() > epsilon for each in tuned)
        assert {0, 1, 2, 3} == set(torch.unique(torch.as_tensor(count)).tolist())
