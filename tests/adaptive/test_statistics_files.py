"""What collectors write is read back, belongs to its checkpoint and replaces nothing else."""

from __future__ import annotations

import json
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import pymerge
from pymerge.adaptive import save as saving
from pymerge.checkpoint import find_statistics, open_checkpoint
from pymerge.errors import CheckpointError, PymergeError, StorageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x).sum(-1, keepdim=True) + self.b(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def folder(net, tmp_path):
    save_file({k: v.numpy() for k, v in net.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def grams(net, x):
    with pymerge.collect(net) as collector:
        net(x)
    return collector


def fishers(net, x):
    with pymerge.collect(net, "fisher", estimator="exact") as collector:
        collector.backward(net(x))
    return collector


def test_a_gram_is_packed_row_after_row(net, folder):
    x = torch.randn(50, 5)
    assert grams(net, x).save(folder) == folder / "pymerge-statistics"
    index = json.loads((folder / "pymerge-statistics/statistics.json").read_text())
    entry = {"key": "a.weight", "columns": 5, "rows_seen": 50}
    assert index == {
        "format": 1,
        "gram": {"file": "gram.safetensors", "weights": {"a.weight": entry, "b.weight": entry}},
    }
    tensors = load_file(folder / "pymerge-statistics/gram.safetensors")
    assert tensors.keys() == {"a.weight", "a.weight.rows_seen"}
    assert tensors["a.weight.rows_seen"].tolist() == [50]
    wide = x.double().numpy()
    expected = (wide.T @ wide / 50)[np.tril_indices(5)]
    assert tensors["a.weight"].dtype == np.float32
    np.testing.assert_allclose(tensors["a.weight"], expected, rtol=1e-5, atol=1e-6)


def test_both_kinds_lie_together_and_are_found(net, folder):
    x = torch.randn(20, 5)
    grams(net, x).save(folder)
    fisher = fishers(net, x)
    fisher.save(folder)
    grams(net, torch.randn(7, 5)).save(str(folder))
    for where in (folder, str(folder), open_checkpoint(str(folder))):
        found = find_statistics(where, "gram")
        assert list(found.entries) == ["a.weight", "b.weight"]
        assert {gram.rows_seen for gram in found.grams.values()} == {7}
        assert found.entries["a.weight"].shape == (15,)
        assert found.entries["a.weight"] is found.entries["b.weight"]
        found = find_statistics(where, "fisher")
        assert (found.examples, found.estimator) == (20, "exact")
    names = dict(net.named_parameters())
    assert {name: entry.shape for name, entry in found.entries.items()} == {
        name: tuple(parameter.shape) for name, parameter in names.items()
    }
    every = torch.cat([fisher.fisher(name).double().reshape(-1) for name in names])
    assert found.norm == pytest.approx(float(every.norm()), rel=1e-12)
    entry = found.entries["b.weight"]
    data = np.fromfile(entry.file, "<f4", entry.num_elements, offset=entry.offset)
    assert np.array_equal(data.reshape(entry.shape), fisher.fisher("b.weight").numpy())


def test_conv1d_says_that_it_is_transposed(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(4, 4))
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    grams(model, torch.randn(3, 4)).save(tmp_path)
    assert find_statistics(tmp_path, "gram").grams["0.weight"].transposed


def test_a_layer_that_was_never_called_has_none(tmp_path):
    class Half(Net):
        def forward(self, x):
            return self.a(x)

    grams(Half(), torch.randn(3, 5)).save(tmp_path)
    index = json.loads((tmp_path / "pymerge-statistics/statistics.json").read_text())
    assert list(index["gram"]["weights"]) == ["a.weight"]
    for kind in ("gram", "fisher"):
        with pytest.raises(PymergeError, match="found none"):
            pymerge.collect(Half(), kind).save(tmp_path)


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_what_is_not_finite_is_not_written(net, folder, kind):
    x = torch.randn(4, 5)
    collected = {"gram": grams, "fisher": fishers}[kind]
    collected(net, x).save(folder)
    before = snapshot(folder)
    x[0, 0] = float("inf")
    with pytest.raises(PymergeError, match=r"expected finite.*'[ab]\."):
        collected(net, x).save(folder)
    assert snapshot(folder) == before


def snapshot(folder):
    return {p.name: p.read_bytes() for p in (folder / "pymerge-statistics").iterdir()}


def test_statistics_of_another_model_are_refused_when_they_are_saved(net, folder):
    wrapped = nn.Sequential(net)
    with pytest.raises(CheckpointError, match=r"'0\.a\.weight', which it does not have"):
        grams(wrapped, torch.randn(2, 5)).save(folder)
    net.b = nn.Linear(5, 4)
    with pytest.raises(CheckpointError, match=r"b\.weight' with the checkpoint's shape \[3, 5\]"):
        grams(net, torch.randn(2, 5)).save(folder)
    assert not (folder / "pymerge-statistics").exists()


@pytest.mark.parametrize("stop", range(3))
def test_whenever_saving_stops_the_index_is_true(net, folder, monkeypatch, stop):
    """Each rename is the last: what is found is the old, nothing, or the new."""
    fishers(net, torch.randn(3, 5)).save(folder)
    grams(net, torch.randn(3, 5)).save(folder)
    rename, count = os.replace, iter(range(3))

    def replace(source, target):
        if next(count) == stop:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(saving.os, "replace", replace)
    with pytest.raises(StorageError, match=r"pymerge-statistics.*No space left"):
        grams(net, torch.randn(8, 5)).save(folder)
    found = find_statistics(folder, "gram")
    if stop == 0:
        assert found.grams["a.weight"].rows_seen == 3
        assert load_file(found.header.path)["a.weight.rows_seen"].tolist() == [3]
    else:
        assert found is None
    assert find_statistics(folder, "fisher").examples == 3
    monkeypatch.undo()
    grams(net, torch.randn(8, 5)).save(folder)
    assert find_statistics(folder, "gram").grams["a.weight"].rows_seen == 8
    assert not list(folder.rglob("*.partial"))


def test_a_write_that_fails_half_way_says_why(tmp_path):
    model = nn.Sequential(nn.Linear(300, 2))
    collected = grams(model, torch.randn(3, 300))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match="failed: File too large"):
            collected.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "pymerge-statistics").iterdir())


def test_a_saved_transformers_model(tmp_path):
    """GPT-2: Conv1D, a tied head, and a base model whose names are shorter by its class."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(16, (2, 6))
    with pymerge.collect(model) as collector, torch.no_grad():
        model(input_ids=ids)
    collector.save(tmp_path)
    with pymerge.collect(model, "fisher") as fisher:
        for example in range(2):
            fisher.backward(model(input_ids=ids[example : example + 1]).logits)
    fisher.save(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    found = find_statistics(checkpoint, "gram")
    shapes = {name: checkpoint.tensors[name].shape for name in found.entries}
    assert len(shapes) == 8
    assert all(found.grams[name].columns == shape[0] for name, shape in shapes.items())
    assert all(found.grams[name].transposed for name in shapes)
    assert find_statistics(checkpoint, "fisher").entries.keys() == checkpoint.tensors.keys()
    with pymerge.collect(model.transformer) as short, torch.no_grad():
        model.transformer(input_ids=ids)
    with pytest.raises(CheckpointError, match=r"its nearest is 'transformer\.h\.0\.attn"):
        short.save(tmp_path)
