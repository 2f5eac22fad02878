"""PyTorch files: refused unless allowed, then converted once and exactly."""

from __future__ import annotations

import os
import pickle

import pytest

from pymerge.checkpoint import open_checkpoint
from pymerge.errors import CheckpointError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder, name, content, **options):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name, **options)
    return folder / name


def read(checkpoint):
    """Names to (dtype name, shape, bytes), read without the code under test's formats."""
    return {
        name: (entry.format.torch_name, entry.shape, _bytes(entry))
        for name, entry in checkpoint.tensors.items()
    }


def _bytes(entry):
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.num_bytes)


def truth(tensor):
    data = bytes(tensor.contiguous().flatten().untyped_storage())[
        : tensor.numel() * tensor.element_size()
    ]
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


@pytest.fixture
def state():
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    return {
        "f32": whole,
        "transposed": torch.randn(3, 4).t().to(torch.bfloat16),
        "view": whole[2:4],
        "strided": whole[:, ::2],
        "f16": torch.randn(5).half(),
        "f64": torch.randn(2, 2, 2).double(),
        "ids": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
def test_converts_every_tensor_exactly(tmp_path, state, zipped, wrapped):
    content = {"state_dict": state, "epoch": 3} if wrapped else state
    path = save(tmp_path, "w.pt", content, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(str(path), allow_pickle=True)
    assert checkpoint.folder is None
    expected = {name: truth(tensor.detach().contiguous().clone()) for name, tensor in state.items()}
    assert read(checkpoint) == expected


def test_refused_with_a_sentence(tmp_path, state):
    path = save(tmp_path / "m", "pytorch_model.bin", state)
    for reference in (path, path.parent):
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*pickles.*Convert"):
            open_checkpoint(str(reference))


def test_converted_once_until_the_file_changes(tmp_path, state, cache):
    path = save(tmp_path / "m", "pytorch_model.bin", {"a": torch.ones(2)})
    first = open_checkpoint(str(path.parent), allow_pickle=True).headers[0]
    again = open_checkpoint(str(path.parent), allow_pickle=True).headers[0]
    assert (again.path, again.mtime_ns) == (first.path, first.mtime_ns)
    assert cache in first.path.parents
    torch.save({"b": torch.ones(2)}, path)
    os.utime(path, ns=(1, 1))
    changed = open_checkpoint(str(path.parent), allow_pickle=True)
    assert list(changed.tensors) == ["b"]
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ('{"tie_word_embeddings": true}', ["embed", "other"]),
        ("{}", ["embed", "other"]),
        ('{"tie_word_embeddings": false}', ["embed", "other", "head"]),
        (None, ["embed", "other", "head"]),
    ],
)
def test_tied_storage(tmp_path, config, names):
    weight = torch.randn(4, 4)
    path = save(
        tmp_path / "m", "pytorch_model.bin", {"embed": weight, "other": weight[:2], "head": weight}
    )
    if config is not None:
        (tmp_path / "m" / "config.json").write_text(config)
    checkpoint = open_checkpoint(str(path.parent), allow_pickle=True)
    assert list(checkpoint.tensors) == names
    for name in set(names) - {"other"}:
        assert _bytes(checkpoint.tensors[name]) == truth(weight)[2]


def test_sharded_with_index(tmp_path):
    weight = torch.randn(4)
    save(tmp_path / "m", "pytorch_model-00001-of-00002.bin", {"a": weight, "tied": weight})
    save(tmp_path / "m", "pytorch_model-00002-of-00002.bin", {"b": weight})
    index = tmp_path / "m" / "pytorch_model.bin.index.json"
    (tmp_path / "m" / "config.json").write_text("{}")
    first, second = '"pytorch_model-00001-of-00002.bin"', '"pytorch_model-00002-of-00002.bin"'
    index.write_text(f'{{"weight_map":{{"a":{first},"tied":{first},"b":{second}}}}}')
    assert list(open_checkpoint(str(tmp_path / "m"), allow_pickle=True).tensors) == ["a", "b"]
    with pytest.raises(CheckpointError, match="only PyTorch files"):
        open_checkpoint(str(tmp_path / "m"))
    index.write_text(f'{{"weight_map":{{"a":{first},"lost":{first},"b":{second}}}}}')
    with pytest.raises(CheckpointError, match="'lost'"):
        open_checkpoint(str(tmp_path / "m"), allow_pickle=True)


def test_safetensors_win_and_trainer_files_are_ignored(tmp_path, packed_tensors):
    save(tmp_path / "m", "pytorch_model.bin", {"a": torch.ones(1)})
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        save(tmp_path / "m", name, {"state": 1})
    checkpoint = open_checkpoint(str(tmp_path / "m"), allow_pickle=True)
    assert list(checkpoint.tensors) == ["a"]
    (tmp_path / "m" / "model.safetensors").write_bytes(packed_tensors({"s": ("U8", [1])}))
    assert list(open_checkpoint(str(tmp_path / "m")).tensors) == ["s"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": Hostile()}, "refuses"),
        ([torch.ones(1)], "mapping"),
        ({"a": 3}, "'a'.*int"),
        ({3: torch.ones(1)}, "names of tensors"),
        ({"": torch.ones(1)}, "names of tensors"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({}, "expected tensors"),
    ],
)
def test_refuses_other_content(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, "w.bin", content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(path), allow_pickle=True)
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_refuses_damaged_files(tmp_path, damage):
    path = save(tmp_path, "w.bin", {"a": torch.ones(100)})
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "text": b"hello",
            "pickle": pickle.dumps({"a": [1]}, protocol=2),
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"w\.bin"):
        open_checkpoint(str(path), allow_pickle=True)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    from pymerge.cache import cache_folder

    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PYMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/pymerge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/someone")
    assert str(cache_folder()) == "/someone/.cache/pymerge"
