"""Small checkpoints with a task each, and their merges by the methods that keep the tasks apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pymerge

#: Odd sizes, so that rows of bits end within a byte and tiles within a tensor.
SHAPES = {
    "model.embed_tokens.weight": (37, 19),
    "model.layers.0.mlp.up_proj.weight": (101, 211),
    "model.layers.0.input_layernorm.weight": (19,),
    "model.layers.0.scalar": (),
    "model.layers.0.empty": (0, 4),
    "lm_head.weight": (37, 19),
}


def make_tensors(seed: int, dtype: torch.dtype, change: float) -> dict[str, torch.Tensor]:
    base = torch.Generator().manual_seed(0)
    tuned = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        values = 0.02 * torch.randn(shape, generator=base)
        delta = change * torch.randn(shape, generator=tuned)
        delta = delta * (torch.rand(shape, generator=tuned) < 0.7)
        found[name] = (values + delta).to(dtype)
    found["model.positions"] = torch.arange(5)
    return found


def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text('{"of": "' + folder.name + '"}')
    return folder


class Tasks:
    """A base and fine-tuned models."""

    def __init__(self, folder: Path, num: int, dtype: torch.dtype) -> None:
        self.base_tensors = make_tensors(0, dtype, 0.0)
        self.tensors = [make_tensors(seed, dtype, 1e-3 * seed) for seed in range(1, num + 1)]
        self.base = save(folder / "base", self.base_tensors)
        self.folders = [save(folder / f"task-{i}", t) for i, t in enumerate(self.tensors)]

    def recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(self.base),
            "models": [{"model": str(folder)} for folder in self.folders],
        }
        return found | ({"parameters": parameters} if parameters else {})


@pytest.fixture
def make_tasks(tmp_path: Path) -> Callable[..., Tasks]:
    """``make_tasks(num, dtype)`` writes a base and so many tasks."""

    def make(num: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tasks:
        return Tasks(tmp_path / f"models-{num}-{dtype}", num, dtype)

    return make


@pytest.fixture
def save_model() -> Callable[..., Path]:
    return save


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tasks, Path]:
    """Three tasks in bfloat16 and their merge by emr; not to be changed."""
    folder = tmp_path_factory.mktemp("merged")
    tasks = Tasks(folder / "models", 3, torch.bfloat16)
    pymerge.merge(tasks.recipe("emr"), folder / "emr", backend="reference")
    return tasks, folder / "emr"
