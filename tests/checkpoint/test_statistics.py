"""The index of statistics: what is found, and what is refused; files written by hand."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

import pymerge
from pymerge.checkpoint import find_statistics, open_checkpoint
from pymerge.errors import CheckpointError, PlanError

MODEL = {
    "q.weight": ("BF16", [3, 4]),
    "k.weight": ("BF16", [4, 4]),
    "c.weight": ("F32", [4, 2]),
    "norm.weight": ("F32", [4]),
}
INDEX = {
    "format": 1,
    "gram": {
        "file": "gram.safetensors",
        "weights": {
            "q.weight": {"key": "q.weight", "columns": 4, "rows_seen": 9},
            "k.weight": {"key": "q.weight", "columns": 4, "rows_seen": 9},
            "c.weight": {"key": "c.weight", "columns": 4, "rows_seen": 2, "transposed": True},
        },
    },
    "fisher": {
        "file": "fisher.safetensors",
        "norm": 0.25,
        "examples": 3,
        "estimator": "monte_carlo",
    },
}
GRAM = {"q.weight.rows_seen": ("I64", [1]), "q.weight": ("F32", [10]), "c.weight": ("F32", [10])}
FISHER = {"q.weight": ("F32", [3, 4]), "norm.weight": ("F32", [4])}


@pytest.fixture
def write(save, packed_tensors):
    def make(index=INDEX, gram=GRAM, fisher=FISHER):
        path = save("m/model.safetensors", packed_tensors(MODEL))
        for name, tensors in (("gram", gram), ("fisher", fisher)):
            if tensors is not None:
                save(f"m/pymerge-statistics/{name}.safetensors", packed_tensors(tensors))
        save("m/pymerge-statistics/statistics.json", index)
        return path.parent

    return make


def test_grams(write):
    folder = write()
    found = find_statistics(folder, "gram")
    assert found.kind == "gram"
    assert found.path == folder / "pymerge-statistics" / "statistics.json"
    assert {name: entry.name for name, entry in found.entries.items()} == {
        "q.weight": "q.weight",
        "k.weight": "q.weight",
        "c.weight": "c.weight",
    }
    entry = found.entries["c.weight"]
    assert (entry.format.name, entry.shape, entry.num_bytes) == ("F32", (10,), 40)
    data = entry.file.read_bytes()
    assert data[entry.offset + 40 :] == b""
    assert found.grams["c.weight"].transposed
    assert not found.grams["k.weight"].transposed
    assert [found.grams[name].rows_seen for name in found.entries] == [9, 9, 2]


def test_fisher(write):
    found = find_statistics(open_checkpoint(str(write())), "fisher")
    assert {name: entry.shape for name, entry in found.entries.items()} == {
        "q.weight": (3, 4),
        "norm.weight": (4,),
    }
    assert (found.norm, found.examples, found.estimator) == (0.25, 3, "monte_carlo")


def test_none(write, save, packed_tensors):
    path = save("bare/model.safetensors", packed_tensors(MODEL))
    assert find_statistics(path.parent, "gram") is None
    assert find_statistics(open_checkpoint(str(path)), "gram") is None
    folder = write({key: INDEX[key] for key in ("format", "gram")})
    assert find_statistics(folder, "fisher") is None
    assert find_statistics(folder, "gram") is not None
    with pytest.raises(ValueError, match="gram or fisher"):
        find_statistics(folder, "hessian")


def changed(path, value):
    index = copy.deepcopy(INDEX)
    place = index
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return index


Q = ("gram", "weights", "q.weight")


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("gram", ("format",), 2, r"format: expected 1, found 2; update pymerge"),
        ("gram", ("gram",), [], r"gram: expected an object"),
        ("gram", ("gram", "file"), "../x.safetensors", r"gram, file: expected the name of a file"),
        (
            "gram",
            ("gram", "file"),
            "lost.safetensors",
            r"'lost\.safetensors' beside it, found none",
        ),
        ("gram", ("gram", "weights"), {}, r"gram, weights: expected weights by name"),
        ("gram", Q, 3, r"'q\.weight': expected a key"),
        ("gram", (*Q, "key"), "gone", r"a tensor 'gone' in gram\.safetensors, found nothing"),
        ("gram", (*Q, "columns"), 5, r"expected F32 \[15\] in gram.safetensors, found F32 \[10\]"),
        ("gram", (*Q, "columns"), True, r"columns: expected a positive whole number .*found True"),
        ("gram", (*Q, "rows_seen"), 0, r"rows_seen: expected a positive whole number .*found 0"),
        ("gram", (*Q, "rows_seen"), 10**400, r"rows_seen: expected a positive whole number of 64"),
        ("gram", (*Q, "transposed"), True, r"columns: expected the inputs of a weight \[3, 4\]"),
        (
            "gram",
            ("gram", "weights", "q_weight"),
            INDEX["gram"]["weights"]["q.weight"],
            r"'q_weight', which it does not have; its nearest is 'q\.weight'",
        ),
        (
            "gram",
            ("gram", "weights", "norm.weight"),
            INDEX["gram"]["weights"]["q.weight"],
            r"'norm\.weight', columns: expected the inputs of a weight \[4\], found 4",
        ),
        ("fisher", ("fisher", "norm"), float("inf"), r"norm: expected a number from 0"),
        ("fisher", ("fisher", "norm"), float("nan"), r"norm: expected a number from 0"),
        ("fisher", ("fisher", "norm"), "1", r"norm: expected a number from 0"),
        ("fisher", ("fisher", "norm"), 10**400, r"norm: expected a number from 0"),
        ("fisher", ("fisher", "norm"), 1e-320, r"norm: expected a number from 0"),
        ("fisher", ("fisher", "examples"), 0.5, r"examples: expected a positive whole number"),
        ("fisher", ("fisher", "estimator"), "magic", r"estimator: expected one of monte_carlo"),
    ],
)
def test_an_index_that_is_wrong_is_refused(write, kind, path, value, message):
    folder = write(changed(path, value))
    with pytest.raises(CheckpointError, match=message) as caught:
        find_statistics(folder, kind)
    assert "statistics.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**FISHER, "norm.weight": ("F32", [2, 2])}, r"shape \[4\], found \[2, 2\]"),
        ({**FISHER, "norm.weight": ("BF16", [4])}, r"expected F32, found BF16 \[4\]"),
        ({**FISHER, "other.bias": ("F32", [4])}, r"'other\.bias', which it does not have"),
    ],
)
def test_fishers_of_another_model_are_refused(write, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        find_statistics(write(fisher=tensors), "fisher")


def test_an_adapter_on_the_model_has_none(write, save, packed_tensors):
    folder = write()
    save(
        "adapter/adapter_config.json",
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]},
    )
    factors = {"lora_A": [1, 4], "lora_B": [3, 1]}
    save(
        "adapter/adapter_model.safetensors",
        packed_tensors({f"base_model.model.q.{x}.weight": ("F32", s) for x, s in factors.items()}),
    )
    adapter = folder.parent / "adapter"
    assert find_statistics(open_checkpoint(str(folder), adapter=str(adapter)), "gram") is None


def test_statistics_are_no_part_of_the_model(write):
    folder = write()
    assert open_checkpoint(str(folder)).tensors.keys() == MODEL.keys()
    with pytest.raises(CheckpointError, match="found statistics of one; name the folder above it"):
        open_checkpoint(str(folder / "pymerge-statistics"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found no weights"):
        open_checkpoint(str(folder))


def test_a_merge_does_not_take_them_along(model_folder):
    for name in ("llama", "llama-finance", "llama-medicine"):
        place = model_folder / name / "pymerge-statistics"
        place.mkdir()
        shutil.copy(model_folder / name / "model.safetensors", place / "gram.safetensors")
        (place / "statistics.json").write_text(json.dumps(INDEX))
    recipe = (model_folder / "recipe.yml").read_text().replace("./", f"{model_folder}/")
    pymerge.merge(recipe, model_folder / "out")
    assert not list((model_folder / "out").rglob("*statistics*"))
    assert pymerge.verify(model_folder / "out").ok


def test_a_merge_over_a_model_removes_what_was_collected_of_it(model_folder):
    recipe = (model_folder / "recipe.yml").read_text().replace("./", f"{model_folder}/")
    out = model_folder / "out"
    pymerge.merge(recipe, out)
    place = out / "pymerge-statistics"
    place.mkdir()
    for name in ("gram.safetensors", "fisher.safetensors", "statistics.json", "notes.txt"):
        (place / name).write_text("{}")
    pymerge.merge(recipe, out, overwrite=True)
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


def test_those_beside_a_donor_are_not_its_merges(write, tmp_path):
    """A document that only copies reads its donor's elements and is another model all the same."""
    folder = write()
    text = (
        f"name: inner\nmerge_method: passthrough\nmodels: [{{model: {folder}}}]\n---\n"
        f"merge_method: fisher\nmodels: [{{model: inner}}, {{model: {folder}}}]\n"
    )
    with pytest.raises(PlanError, match="none beside inner;"):
        pymerge.merge_documents(text, tmp_path / "out")
