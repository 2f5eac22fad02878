"""`pymerge run -- mergekit-…`: mergekit's own commands in one process with our engine.

What they write is compared with what the same commands write without us.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(peers_python: Path, tmp_path: Path) -> Command:
    """Runs a command of mergekit, through pymerge with these options or without them."""

    def run(*arguments: Any, through: tuple[str, ...] | None) -> subprocess.CompletedProcess[str]:
        program = [peers_python.with_name(arguments[0])]
        if through is not None:
            program = [peers_python.with_name("pymerge"), "run", *through, "--", arguments[0]]
        return subprocess.run(
            [*program, *arguments[1:]],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYMERGE_CACHE": str(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def same_tensors(theirs: Path, ours: Path) -> None:
    expected, found = load_file(theirs), load_file(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-7)


def write_adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter on the query projections of a model of the fixtures."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, 64, generator=generator) / 8
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(64, 4, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_mergekit_yaml_with_an_adapter(command: Command, llamas: Path, tmp_path: Path) -> None:
    """base+adapter needs peft, whose import is put off."""
    write_adapter(tmp_path / "adapter", 1)
    (tmp_path / "recipe.yaml").write_text(f"""
        merge_method: linear
        models:
          - {{model: {llamas}/base+{tmp_path}/adapter, parameters: {{weight: 0.75}}}}
          - {{model: {llamas}/b, parameters: {{weight: 0.25}}}}
        base_model: {llamas}/b
        dtype: float32
    """)
    for name, through in (("plain", None), ("ours", ("--memory", "2GiB", "--threads", "1"))):
        options = ("--lora-merge-cache", tmp_path / f"cache-{name}", "--quiet")
        arguments = ("mergekit-yaml", "recipe.yaml", tmp_path / name / "out", *options)
        done = command(*arguments, through=through)
        assert (tmp_path / name / "out" / "config.json").exists(), done.stderr[-3000:]
        assert "leaves" not in done.stderr
    plain, ours = tmp_path / "plain" / "out", tmp_path / "ours" / "out"
    same_tensors(plain / "model.safetensors", ours / "model.safetensors")
    assert sorted(path.name for path in ours.iterdir()) == sorted(
        path.name for path in plain.iterdir()
    )
    assert (ours / "README.md").read_text() == (plain / "README.md").read_text()


def test_mergekit_pytorch(command: Command, llamas: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text(f"""
        merge_method: task_arithmetic
        base_model: {llamas}/base/model.safetensors
        models:
          - {{model: {llamas}/a/model.safetensors, parameters: {{weight: 0.75}}}}
          - {{model: {llamas}/b/model.safetensors, parameters: {{weight: 0.25}}}}
        dtype: float32
    """)
    for name, through in (("plain", None), ("ours", ())):
        done = command("mergekit-pytorch", "flat.yaml", tmp_path / name, through=through)
        assert done.returncode == 0, done.stderr[-3000:]
    same_tensors(tmp_path / "plain" / "model.safetensors", tmp_path / "ours" / "model.safetensors")
    assert "Merging (pymerge)" in done.stderr


def test_mergekit_multi(command: Command, llamas: Path, tmp_path: Path) -> None:
    """The second merge takes the output of the first."""
    (tmp_path / "multi.yaml").write_text(f"""
name: first
merge_method: linear
models:
  - {{model: {llamas}/a, parameters: {{weight: 0.5}}}}
  - {{model: {llamas}/b, parameters: {{weight: 0.5}}}}
base_model: {llamas}/a
dtype: float32
---
merge_method: slerp
base_model: first
models: [{{model: {llamas}/c}}]
parameters: {{t: 0.3}}
dtype: float32
    """)
    for name, through in (("plain", None), ("ours", ())):
        places = ("-I", tmp_path / name / "between", "--out-path", tmp_path / name / "out")
        done = command("mergekit-multi", "multi.yaml", *places, through=through)
        assert (tmp_path / name / "out" / "config.json").exists(), done.stderr[-3000:]
    for folder in ("between/first", "out"):
        file = f"{folder}/model.safetensors"
        same_tensors(tmp_path / "plain" / file, tmp_path / "ours" / file)


def test_a_budget_below_what_mergekit_holds_is_refused(
    command: Command, llamas: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"""
        merge_method: linear
        models: [{{model: {llamas}/a, parameters: {{weight: 1}}}}]
        dtype: float32
    """)
    arguments = ("mergekit-yaml", "recipe.yaml", tmp_path / "out")
    done = command(*arguments, through=("--memory", "96MiB"))
    assert done.returncode == 2
    assert "error: memory: expected more than the" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("mergekit-ymal", "a", "b"), "did you mean mergekit-yaml?"),
        (("ls",), "expected a command of mergekit"),
    ],
)
def test_other_commands_are_refused(
    given: tuple[str, ...], sentence: str, peers_python: Path
) -> None:
    program = [peers_python.with_name("pymerge"), "run", "--", *given]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
