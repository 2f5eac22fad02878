"""Extracted and combined adapters against PEFT and mergekit.

PEFT loads what is written without a word about missing or unknown keys, merges it to the weights
that pymerge merges it to, and combines adapters to the same updates. PEFT works in float32, pymerge
in float64 rounded once: the updates agree to 1e-5 of their norm. mergekit decomposes in float32 by
LAPACK; where the last singular value that is kept and the first that is not are near each other,
its directions are uncertain to 1e-4.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge

DRIVER = Path(__file__).with_name("drive_peft_lora.py")


def combinations() -> dict[str, dict[str, Any]]:
    """The driver's table, read without importing what it imports."""
    source = DRIVER.read_text()
    scope: dict[str, Any] = {}
    exec(source[source.index("COMBINATIONS = ") : source.index("TARGETS = ")], scope)
    found: dict[str, dict[str, Any]] = scope["COMBINATIONS"]
    return found


@pytest.fixture(scope="module")
def folder(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = subprocess.run([peers_python, "-c", "import peft, transformers"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"peft is not installed in the environment of {peers_python}: install it there")
    made = tmp_path_factory.mktemp("peft-lora")
    run(peers_python, "make", made)
    return made


def run(python: Path, *args: object) -> None:
    command = [python, DRIVER, *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """B A of each module in float64; the scale is 1."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name or name.endswith("lora_embedding_A"):
            b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            product = b.double() @ a.double()
            found[module] = product.T if "embedding_A" in name else product
    return found


@pytest.mark.parametrize("method", combinations())
def test_combines_as_peft_does(folder: Path, tmp_path: Path, method: str) -> None:
    options = dict(combinations()[method])
    adapters = [folder / name for name in options.pop("adapters")]
    rank = options.pop("svd_rank", None)
    pymerge.combine_lora(adapters, tmp_path / "out", method=method, rank=rank, **options)
    found, expected = updates(tmp_path / "out"), load_file(folder / f"{method}.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value.double()).norm() < 1e-5 * value.double().norm(), name


@pytest.mark.parametrize("method", ["svd", "cat", "robust_merge"])
def test_peft_loads_combined_adapters(
    folder: Path, tmp_path: Path, peers_python: Path, method: str
) -> None:
    names = ["one", "three"] if method != "robust_merge" else ["one", "one"]
    pymerge.combine_lora([folder / name for name in names], tmp_path / "out", method=method)
    same_merge(folder / "llama", tmp_path, peers_python)


def same_merge(base: Path, tmp_path: Path, python: Path) -> dict[str, torch.Tensor]:
    """PEFT's and pymerge's merge of the adapter ``out`` are the same, to a few roundings."""
    run(python, "load", base, tmp_path / "out", tmp_path / "peft.safetensors")
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'out'}"}]}
    pymerge.merge(recipe, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(tmp_path / "peft.safetensors")
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2.0**-22)
    return expected


EXTRACTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "full rank": ("llama", {}),
    "embed": ("llama", {"embed": True}),
    "all biases": ("llama", {"include": ["[qkv]_proj"]}),
    "few layers": ("llama", {"include": [r"layers\.1\..*(q|down)_proj"]}),
    "conv1d": ("gpt2", {}),
}


@pytest.mark.parametrize("name", EXTRACTIONS)
def test_peft_turns_the_base_into_the_tuned_model(
    folder: Path, tmp_path: Path, peers_python: Path, name: str
) -> None:
    """At full rank the tuned model comes back, in every tensor that was not left out."""
    model, options = EXTRACTIONS[name]
    base, tuned = folder / model, folder / f"{model}-tuned"
    report = pymerge.extract_lora(base, tuned, tmp_path / "out", **options)
    assert not report.warnings
    merged = same_merge(base, tmp_path, peers_python)
    wanted = load_file(tuned / "model.safetensors")
    old = load_file(base / "model.safetensors")
    for key, value in wanted.items():
        left_out = key.rpartition(".")[0] in report.left_out
        expected = old[key] if left_out else value
        torch.testing.assert_close(merged[key], expected, rtol=0, atol=2.0**-22)


def test_extracts_what_mergekit_extracts(folder: Path, tmp_path: Path, peers_python: Path) -> None:
    program = peers_python.parent / "mergekit-extract-lora"
    if not program.exists():
        pytest.skip("this mergekit has no mergekit-extract-lora")
    base, tuned = folder / "llama", folder / "llama-tuned"
    command = [program, "--model", tuned, "--base-model", base, "--out-path", tmp_path / "theirs"]
    command += ["--max-rank", "4", "--no-lazy-unpickle"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    pymerge.extract_lora(base, tuned, tmp_path / "ours", rank=4)
    theirs, ours = updates(tmp_path / "theirs"), updates(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 1e-4 * value.norm(), name
    found, expected = (
        load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")
    )
    whole = {key for key in expected if "lora_" not in key}
    assert whole == {key for key in found if "lora_" not in key and ".base_layer." not in key}
    assert all(torch.equal(found[key], expected[key]) for key in whole)
