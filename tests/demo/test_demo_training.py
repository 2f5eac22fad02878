"""Training, saving and evaluating the demo's models, on a network too small to learn anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.demo import checkpoint
from pymerge.demo.data import Split, Task
from pymerge.demo.experts import trained_models
from pymerge.demo.model import Architecture, ResidualMLP
from pymerge.demo.run import evaluate
from pymerge.demo.train import Settings, finetune, pretrain
from pymerge.errors import CheckpointError

TINY = Settings(hidden_size=16, intermediate_size=24, pretrain_steps=2, finetune_epochs=1)


def random_task(name: str, num_classes: int, seed: int) -> Task:
    rng = np.random.default_rng(seed)

    def split(count: int) -> Split:
        images = rng.normal(size=(count, 64)).astype(np.float32)
        return Split(images, rng.integers(0, num_classes, count))

    return Task(name, num_classes, split(100), split(20), split(20))


TASKS = [random_task("left", 3, 0), random_task("right", 4, 1)]


def state_bytes(model: ResidualMLP) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_same_settings_give_the_same_bytes() -> None:
    first, second = pretrain(TASKS, TINY), pretrain(TASKS, TINY)
    assert state_bytes(first) == state_bytes(second)
    assert state_bytes(finetune(first, TASKS[0], TINY)) == state_bytes(
        finetune(second, TASKS[0], TINY)
    )
    assert state_bytes(first) != state_bytes(pretrain(TASKS, replace(TINY, seed=1)))


def test_finetuning_moves_the_encoder_and_no_head() -> None:
    base = pretrain(TASKS, TINY)
    before = state_bytes(base)
    after = state_bytes(finetune(base, TASKS[1], TINY))
    assert state_bytes(base) == before
    for name in before:
        assert (after[name] == before[name]) == name.startswith("heads."), name


def test_layers_are_named_by_index() -> None:
    names = set(pretrain(TASKS, TINY).state_dict())
    assert {"embed.weight", "blocks.0.fc1.weight", "blocks.1.fc2.bias"} <= names


def test_saved_folder_is_sharded_and_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2000)
    model = pretrain(TASKS, TINY)
    checkpoint.save(model, tmp_path)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    on_disk = {name: (path.name, t) for path in files for name, t in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in on_disk.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in on_disk.values())
    assert state_bytes(checkpoint.load(tmp_path)) == state_bytes(model)


def test_loading_a_folder_without_index(tmp_path: Path) -> None:
    model = pretrain(TASKS, TINY)
    checkpoint.save(model, tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    state = dict(model.state_dict())
    save_file(state, tmp_path / "model.safetensors")
    assert state_bytes(checkpoint.load(tmp_path)) == state_bytes(model)
    del state["norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        checkpoint.load(tmp_path)


def test_trained_models_are_found_again(tmp_path: Path) -> None:
    told: list[str] = []
    paths, cached = trained_models(tmp_path / "models", TASKS, TINY, told.append)
    assert (list(paths), told, cached) == (
        ["base", "left", "right"],
        ["base", "left", "right"],
        False,
    )
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}

    _, cached = trained_models(tmp_path / "models", TASKS, TINY, told.append)
    assert cached
    assert times == {path: path.stat().st_mtime_ns for path in times}

    _, cached = trained_models(
        tmp_path / "models", TASKS, replace(TINY, pretrain_steps=3), told.append
    )
    assert not cached


def test_interrupted_training_starts_again(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if name == "right":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_models(tmp_path, TASKS, TINY, interrupt)
    paths, cached = trained_models(tmp_path, TASKS, TINY, lambda name: None)
    assert not cached
    assert state_bytes(checkpoint.load(paths["right"]))


def test_accuracy_of_a_model_made_by_hand(tmp_path: Path) -> None:
    """The encoder hands pixels through; the head's class is the larger of the first two pixels."""
    model = ResidualMLP(Architecture({"first": 2}, hidden_size=64, intermediate_size=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.weight.copy_(torch.eye(64))
        model.norm.weight.fill_(1.0)
        model.heads["first"].weight[0, 0] = 1.0
        model.heads["first"].weight[1, 1] = 1.0
    checkpoint.save(model, tmp_path)
    images = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    larger = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    images[np.arange(8), larger] = 5.0
    images[np.arange(8), 1 - larger] = -5.0
    labels = larger.copy()
    labels[:2] = 1 - labels[:2]  # two of eight say otherwise
    right, wrong = Split(images, larger), Split(images, labels)
    task = Task("first", 2, train=right, selection=right, test=wrong)
    assert evaluate(tmp_path, [task], "test") == {"first": 0.75}
    assert evaluate(tmp_path, [task], "selection") == {"first": 1.0}
