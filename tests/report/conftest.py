"""A merge of small models in three formats, and the browser that looks at its report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pymerge

NUM_LAYERS = 3
SHAPES = {
    "model.embed_tokens.weight": (61, 24),
    **{
        f"model.layers.{layer}.{module}": shape
        for layer in range(NUM_LAYERS)
        for module, shape in {
            "input_layernorm.weight": (24,),
            "mlp.up_proj.weight": (190, 24),
            "self_attn.q_proj.weight": (24, 24),
        }.items()
    },
    "model.norm.weight": (24,),
}


@dataclass(frozen=True)
class Merged:
    """A folder with ``base``, ``code``, ``math`` and their merge ``out``."""

    folder: Path
    recipe: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name / "model.safetensors")


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": NUM_LAYERS}))


def make_models(folder: Path) -> None:
    """Base in bfloat16, experts in float32 and float16; a third of each expert is the base's."""
    torch.manual_seed(5)
    base = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    write_model(folder / "base", base)
    for name, dtype in (("code", torch.float32), ("math", torch.float16)):
        tuned = {}
        for key, value in base.items():
            step = torch.randn(value.shape) * (torch.rand(value.shape) < 0.7) * 0.1
            tuned[key] = (value.float() + step).to(dtype)
        write_model(folder / name, tuned)


def recipe_text(folder: Path) -> str:
    return f"""\
merge_method: task_arithmetic
base_model: {folder}/base
models:
  - model: {folder}/code
    parameters: {{weight: 0.6}}
  - model: {folder}/math
    parameters: {{weight: 0.3}}
dtype: float16
"""


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("merged")
    make_models(folder)
    (folder / "recipe.yml").write_text(recipe_text(folder))
    pymerge.merge(folder / "recipe.yml", folder / "out", threads=2)
    return Merged(folder, folder / "recipe.yml")


@pytest.fixture(scope="session")
def write() -> object:
    """Writes a model folder: ``write(folder, tensors)``."""
    return write_model


@pytest.fixture(scope="session")
def browser() -> str:
    """A headless Chromium."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found is not None:
            return found
    pytest.skip("the page is looked at in Chromium, which is not installed")
