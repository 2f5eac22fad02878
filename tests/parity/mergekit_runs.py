"""The same recipes through mergekit and through pymerge, for a comparison of all tensors.

A :class:`Case` is any recipe with the options of either side. :func:`run_both` runs all of them,
mergekit's in one process on one torch thread, the number its sums are compared for.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import pymerge

DRIVER = Path(__file__).with_name("drive_mergekit.py")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True)
class Case:
    """A recipe in which {x} stands for the folder of the checkpoint x; ``options`` are fields of
    mergekit's MergeOptions, ``planning`` arguments of ``pymerge.merge``."""

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    planning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The output folders of both programs, and the checkpoints of the recipe by name."""

    theirs: Path
    ours: Path
    inputs: Mapping[str, Path]


def run_both(
    python: Path, checkpoints: Iterable[Path], cases: Mapping[str, Case], work: Path
) -> dict[str, Outcome]:
    """Every case through mergekit (of the environment of ``python``) and through pymerge."""
    folders = sorted(checkpoints)
    jobs, outcomes = [], {}
    for name, case in cases.items():
        text, used = case.recipe, {}
        for folder in folders:
            if f"{{{folder.name}}}" in text:
                text = text.replace(f"{{{folder.name}}}", str(folder))
                used[folder.name] = folder
        recipe = work / f"{name}.yaml"
        recipe.write_text(text)
        outcomes[name] = Outcome(work / "theirs" / name, work / "ours" / name, used)
        options = {"num_threads": 1, **case.options}
        jobs.append({"recipe": str(recipe), "out": str(outcomes[name].theirs), "options": options})
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [python, DRIVER, work / "jobs.json"]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=900)
    for (name, case), job in zip(cases.items(), jobs, strict=True):
        planning = {"numerics": "mergekit", "sync": False, **case.planning}
        pymerge.merge(job["recipe"], outcomes[name].ours, **planning)
    return outcomes


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an output or a checkpoint; an error of mergekit's fails the test."""
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def differing(outcome: Outcome, *, rounded: bool = False) -> dict[str, torch.Tensor]:
    """Where the bytes of the outputs differ, a mask for each tensor, after checking that names,
    shapes and types agree.

    :param rounded: mergekit's tensors may be float32 where ours are not: they are rounded once.
    """
    theirs, ours = tensors_of(outcome.theirs), tensors_of(outcome.ours)
    if rounded:
        theirs = {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
    layouts = [{k: (t.shape, t.dtype) for k, t in side.items()} for side in (theirs, ours)]
    assert layouts[0] == layouts[1]
    return {name: _bits(tensor) != _bits(ours[name]) for name, tensor in theirs.items()}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    carriers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(carriers[tensor.element_size()])
