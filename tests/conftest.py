"""What tests of the whole program share: small models on disk and the installed command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

RECIPE = """\
merge_method: ties
base_model: ./llama
models:
  - model: ./llama-finance
    parameters: {weight: 0.5, density: 0.4}
  - model: ./llama-medicine
    parameters: {weight: 0.5, density: 0.4}
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the float32 models llama, llama-finance, llama-medicine (4 tensors each)."""
    folder = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(7)
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.layers.0.mlp.weight": (8, 16),
        "model.layers.1.mlp.weight": (8, 16),
        "model.norm.weight": (8,),
    }
    base = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for number, name in enumerate(("llama", "llama-finance", "llama-medicine")):
        (folder / name).mkdir()
        tensors = {
            key: value + np.float32(0.1 * number) * random.standard_normal(value.shape, np.float32)
            for key, value in base.items()
        }
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "float32"}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def model_folder(tiny_models: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the tiny models and ``recipe.yml``, which merges them by TIES."""
    shutil.copytree(tiny_models, tmp_path, dirs_exist_ok=True)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="session")
def run_pymerge(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the installed command in a folder, without standard input, both streams as pipes."""
    program = Path(sys.executable).parent / "pymerge"
    if not program.exists():
        pytest.fail(f"expected the installed command {program}; run `make dev`")
    cache = tmp_path_factory.mktemp("cache")

    def run(
        *args: str, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYMERGE_")}
        clean |= {"PYMERGE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **(env or {})}
        return subprocess.run(
            [str(program), *args],
            cwd=cwd,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
