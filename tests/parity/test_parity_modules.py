"""Models of several parts through mergekit-yaml and through pymerge: encoder and decoder, vision.

Every tensor is random, so that one merged at another place of a gradient, or with another layer,
differs far beyond the tolerance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modular import NAMES, write_modular
from safetensors.torch import load_file

pymerge = pytest.importorskip("pymerge")

DRIVER = Path(__file__).with_name("drive_mergekit_commands.py")
#: mergekit plans these two tensors of Qwen2.5-VL twice, at both ends of a gradient.
TWICE = ("visual.merger.mlp.0.", "visual.merger.mlp.2.")

TEXT_SLICES = """
    text_decoder:
      slices:
        - sources:
            - {model: {KIND-a}, layer_range: [0, 2], parameters: {weight: [0.25, 0.75]}}
            - {model: {KIND-b}, layer_range: [1, 3]}
          parameters: {normalize: false}
        - sources: [{model: {KIND-b}, layer_range: [1, 3]}]
      parameters: {weight: 0.5}
"""
VISION = """
    vision_tower:
      models:
        - {model: {KIND-a}, parameters: {weight: [1.0, 3.0]}}
        - {model: {KIND-b}}
      parameters: {weight: [{filter: norm, value: 0.25}, {value: [0.5, 2.0]}]}
    multi_modal_projector:
      models: [{model: {KIND-a}}, {model: {KIND-b}, parameters: {weight: 0.125}}]
"""
RECIPES = {
    "whole": """
  models:
    - {model: {KIND-a}, parameters: {weight: [0.0, 1.0, 4.0]}}
    - {model: {KIND-b}, parameters: {weight: [{filter: norm, value: 0.5}, {value: [2.0, 1.0]}]}}
""",
    "vision": "  modules:\n" + TEXT_SLICES + VISION + "  parameters: {weight: 0.75}\n",
    "encoder-decoder": """
  modules:
    encoder:
      slices:
        - sources: [{model: {KIND-a}, layer_range: [0, 2]}]
        - sources: [{model: {KIND-b}, layer_range: [1, 3]}]
    decoder:
      models:
        - {model: {KIND-a}, parameters: {weight: [1.0, 0.0]}}
        - {model: {KIND-b}, parameters: {weight: [0.0, 1.0]}}
    shared:
      models: [{model: {KIND-a}, parameters: {weight: 0.25}}, {model: {KIND-b}}]
  parameters: {weight: 0.75}
""",
}
JOBS = [("whole", kind) for kind in NAMES] + [
    ("vision", "gemma3"),
    ("vision", "qwen2_5_vl"),
    ("encoder-decoder", "t5"),
]


@pytest.fixture(scope="module")
def work(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``NAME-KIND.yml`` of every job and mergekit's output of it."""
    folder = tmp_path_factory.mktemp("modules")
    for seed, kind in enumerate(NAMES):
        write_modular(folder / f"{kind}-a", kind, seed)
        write_modular(folder / f"{kind}-b", kind, seed + 10)
    jobs = []
    for recipe, kind in JOBS:
        text = f"  merge_method: linear\n  dtype: float32\n{RECIPES[recipe]}"
        for model in "ab":
            text = text.replace(f"{{KIND-{model}}}", str(folder / f"{kind}-{model}"))
        name = folder / f"{recipe}-{kind}"
        name.with_suffix(".yml").write_text(text)
        arguments = [str(name.with_suffix(".yml")), str(name), "--quiet", "--no-copy-tokenizer"]
        arguments.append("--no-write-model-card")
        error = str(name.with_suffix(".error"))
        jobs.append({"command": "mergekit-yaml", "arguments": arguments, "error": error})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    subprocess.run([peers_python, DRIVER, folder / "jobs.json"], check=True, env=environment)
    return folder


def counts(config: dict[str, object]) -> dict[str, object]:
    """Every layer count of a configuration, by its place."""
    found: dict[str, object] = {}
    for part in (None, "text_config", "vision_config"):
        fields = config if part is None else config.get(part, {})
        assert isinstance(fields, dict)
        for key in ("num_layers", "num_decoder_layers", "num_hidden_layers", "depth"):
            if key in fields:
                found[f"{part}.{key}"] = fields[key]
    return found


@pytest.mark.parametrize(("recipe", "kind"), JOBS)
def test_every_part_is_merged_as_mergekit_merges_it(work: Path, recipe: str, kind: str) -> None:
    name = work / f"{recipe}-{kind}"
    error = name.with_suffix(".error")
    assert not error.exists(), error.read_text()
    out = work / f"ours-{recipe}-{kind}"
    command = [sys.executable, "-m", "pymerge.commands.mergekit_yaml", f"{name}.yml", out]
    subprocess.run(command, check=True, capture_output=True)
    theirs = load_file(name / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        if not tensor.startswith(TWICE):
            close = {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(ours[tensor], expected, **close, msg=tensor)
    ours_config = json.loads((out / "config.json").read_text())
    their_counts = counts(json.loads((name / "config.json").read_text()))
    for place, count in counts(ours_config).items():
        assert their_counts.get(place, count) == count, place
