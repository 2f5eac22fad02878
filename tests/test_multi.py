"""Recipes of several documents: the same bytes as one merge after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge import api
from pymerge.errors import PymergeError, RecipeError
from pymerge.recipe import in_order, split_documents

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.w.weight": (33, 16),
    "model.layers.1.w.weight": (33, 16),
    "model.norm.weight": (16,),
}
CHAIN = """\
name: soup
merge_method: linear
models:
  - model: {a}
    parameters: {{weight: 0.3}}
  - model: {b}
    parameters: {{weight: [0.2, 0.9]}}
dtype: bfloat16
---
name: shifted
merge_method: task_arithmetic
base_model: {base}
models:
  - model: soup
    parameters: {{weight: 0.7}}
  - model: {c}
    parameters: {{weight: 0.4}}
---
merge_method: ties
base_model: {base}
models:
  - model: soup
    parameters: {{weight: 1, density: 0.4}}
  - model: shifted
    parameters: {{weight: 0.5, density: 0.6}}
"""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    generator = torch.Generator().manual_seed(5)
    folders = {}
    for name in ("base", "a", "b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            key: torch.randn(shape, generator=generator).bfloat16() for key, shape in SHAPES.items()
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
        folders[name] = str(folder)
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def one_after_another(models: dict[str, str], out: Path) -> dict[str, torch.Tensor]:
    """Each document as a recipe of its own, names replaced by folders."""
    folders = {"soup": str(out / "soup"), "shifted": str(out / "shifted"), None: str(out / "last")}
    for document in split_documents(CHAIN.format(**models)):
        text = document.text.replace("model: soup", f"model: {folders['soup']}")
        text = text.replace("model: shifted", f"model: {folders['shifted']}")
        pymerge.merge(text, folders[document.name], memory="256MiB")
    return weights(out / "last")


def test_folded_merges_give_the_bytes_of_written_ones(
    models: dict[str, str], tmp_path: Path
) -> None:
    expected = one_after_another(models, tmp_path / "single")
    report = pymerge.merge_documents(CHAIN.format(**models), tmp_path / "out", memory="256MiB")
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert report.reports["soup"] is None
    assert report.reports["shifted"] is None
    assert not (tmp_path / "out.intermediates").exists()
    assert pymerge.verify(tmp_path / "out").ok


def test_the_first_document_is_what_float64_says(models: dict[str, str], tmp_path: Path) -> None:
    text = CHAIN.format(**models).split("---")[0] + (
        "---\nmerge_method: linear\nmodels: [{model: soup, parameters: {weight: 1}}]\n"
        "dtype: float32\n"
    )
    pymerge.merge_documents(text, tmp_path / "out")
    a, b = (weights(Path(models[name])) for name in "ab")
    for name, found in weights(tmp_path / "out").items():
        second = 0.9 if ".1." in name else 0.2
        exact = (0.3 * a[name].double() + second * b[name].double()) / (0.3 + second)
        # The soup is bfloat16, as its document says: half a unit of 8 bits.
        np.testing.assert_allclose(found.double(), exact, rtol=2.0**-8, atol=1e-30)
        assert torch.equal(found.bfloat16().float(), found)


def test_intermediates_are_kept_where_asked(models: dict[str, str], tmp_path: Path) -> None:
    expected = one_after_another(models, tmp_path / "single")
    kept = tmp_path / "kept"
    text = CHAIN.format(**models)
    pymerge.merge_documents(text, tmp_path / "out", intermediates=kept)
    assert {path.name for path in kept.iterdir()} == {"soup", "shifted"}
    assert weights(kept / "soup").keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor)
    again = pymerge.merge_documents(text, tmp_path / "out", intermediates=kept)
    assert all(report is not None and report.done_before for report in again.reports.values())


def test_a_method_that_measures_is_written_and_removed(
    models: dict[str, str], tmp_path: Path
) -> None:
    text = """\
name: angled
merge_method: slerp
base_model: {a}
models: [{{model: {b}}}]
parameters: {{t: 0.4}}
---
merge_method: linear
models:
  - {{model: angled, parameters: {{weight: 1}}}}
  - {{model: {c}, parameters: {{weight: 2}}}}
"""
    report = pymerge.merge_documents(text.format(**models), tmp_path / "out")
    assert "slerp" in report.reasons["angled"]
    assert not (tmp_path / "out.intermediates").exists()
    first, second = text.format(**models).split("---")
    pymerge.merge(first.replace("name: angled\n", ""), tmp_path / "angled")
    pymerge.merge(second.replace("angled", str(tmp_path / "angled")), tmp_path / "single")
    for name, tensor in weights(tmp_path / "single").items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor)


def test_documents_may_stand_in_any_order(models: dict[str, str], tmp_path: Path) -> None:
    parts = CHAIN.format(**models).split("---\n")
    pymerge.merge_documents("---\n".join(parts[::-1]), tmp_path / "out")
    pymerge.merge_documents("---\n".join(parts), tmp_path / "same")
    for name, tensor in weights(tmp_path / "same").items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor)


def test_slices_of_an_inner_merge(models: dict[str, str], tmp_path: Path) -> None:
    text = CHAIN.format(**models).split("---\n")[0] + (
        "---\nmerge_method: passthrough\nslices:\n"
        "  - sources: [{model: soup, layer_range: [1, 2]}]\n"
        "  - sources: [{model: soup, layer_range: [0, 2]}]\n"
    )
    pymerge.merge_documents(text, tmp_path / "out", intermediates=tmp_path / "kept")
    pymerge.merge_documents(text, tmp_path / "folded")
    soup, out = weights(tmp_path / "kept" / "soup"), weights(tmp_path / "folded")
    assert torch.equal(out["model.layers.0.w.weight"], soup["model.layers.1.w.weight"])
    assert torch.equal(out["model.layers.2.w.weight"], soup["model.layers.1.w.weight"])
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(out[name], tensor)


def test_lines_in_messages_are_those_of_the_file(models: dict[str, str], tmp_path: Path) -> None:
    text = CHAIN.format(**models).replace("density: 0.6", "densty: 0.6")
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if "densty" in row)
    with pytest.raises(RecipeError, match=rf"recipe\.yml: (.|\n)*line {line}\b"):
        pymerge.merge_documents(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("name: a\n---\nname: a\n", "name 'a'"),
        ("merge_method: x\n---\nmerge_method: y\n", "no name"),
        ("name: a/b\n", "name of a folder"),
        ("name: ..\n", "name of a folder"),
        ("name: [1]\n", "name of a folder"),
        ("name: a\n---\n{", "not valid YAML"),
    ],
)
def test_wrong_documents(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        split_documents(text)


def test_a_circle_is_an_error() -> None:
    assert in_order({"a": ["b"], "b": [], None: ["a"]}) == ["b", "a", None]
    with pytest.raises(RecipeError, match="circle: a uses b uses a;"):
        in_order({"a": ["b"], "b": ["c", "a"], "c": [], None: ["a"]})


def test_a_misspelt_name_is_found(models: dict[str, str], tmp_path: Path) -> None:
    text = CHAIN.format(**models).replace("model: soup", "model: suop")
    with pytest.raises(RecipeError, match="by no other: soup; the model 'suop' resembles 'soup'"):
        pymerge.merge_documents(text, tmp_path / "out")


def test_what_nobody_uses_needs_a_folder(models: dict[str, str], tmp_path: Path) -> None:
    text = CHAIN.format(**models).split("---")[0]
    with pytest.raises(PymergeError, match="every document has a name"):
        pymerge.merge_documents(text, tmp_path / "out")
    with pytest.raises(RecipeError, match="used by no other"):
        pymerge.merge_documents(text)
    report = pymerge.merge_documents(text, intermediates=tmp_path / "kept")
    assert list(report.reports) == ["soup"]


def test_the_command(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(CHAIN.format(**models))
    command = [Path(sys.executable).with_name("pymerge"), "multi", "recipe.yml", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "soup: made while it was read, never written" in done.stdout


def test_warnings_of_a_document_that_is_written_are_shown(
    models: dict[str, str], tmp_path: Path
) -> None:
    text = CHAIN.format(**models).replace("task_arithmetic", "ties")
    text = text.replace("{weight: 0.7}", "{weight: 0.7, density: 0.5}")
    (tmp_path / "recipe.yml").write_text(text.replace("name: shifted\n", "name: shifted\nxyz: 1\n"))
    command = [Path(sys.executable).with_name("pymerge"), "multi", "recipe.yml", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shifted: written for the time of the merge" in done.stdout
    assert done.stderr.count("unknown key 'xyz' is ignored") == 1
    assert "warning: shifted: xyz (line 11)" in done.stderr


def as_both(
    text: str, out: Path, memory: str = "256MiB"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The output with documents made as they are read, and with each one written."""
    pymerge.merge_documents(text, out / "read", memory=memory)
    pymerge.merge_documents(text, out / "kept", memory=memory, intermediates=out / "inner")
    return weights(out / "read"), weights(out / "kept")


def test_what_is_wider_in_between_has_room(models: dict[str, str], tmp_path: Path) -> None:
    """bfloat16 of float32 of bfloat16, in tiles that fill their blocks."""
    generator = torch.Generator().manual_seed(6)
    for name in "abc":
        tensors = {"w.weight": torch.randn(2100, 999, generator=generator).bfloat16()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    text = """\
name: wide
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 0.3}}}}, {{model: {b}, parameters: {{weight: 0.6}}}}]
dtype: float32
---
name: narrow
merge_method: linear
models: [{{model: wide, parameters: {{weight: 0.3}}}}, {{model: {c}, parameters: {{weight: 0.6}}}}]
dtype: bfloat16
---
merge_method: linear
models: [{{model: narrow, parameters: {{weight: 2}}}}, {{model: {a}, parameters: {{weight: 1}}}}]
dtype: bfloat16
"""
    read, kept = as_both(text.format(**models), tmp_path / "out")
    assert torch.equal(read["w.weight"], kept["w.weight"])


@pytest.mark.parametrize(
    "method",
    [
        "merge_method: nuslerp\n",
        "merge_method: model_stock\nbase_model: {base}\nparameters: {{filter_wise: true}}\n",
    ],
)
def test_a_method_of_whole_rows_is_merged_by_itself(
    models: dict[str, str], tmp_path: Path, method: str
) -> None:
    """A tile of the document that reads it need not begin with a row."""
    generator = torch.Generator().manual_seed(6)
    for name in ("a", "b", "c", "base"):
        tensors = {"w.weight": torch.randn(2100, 999, generator=generator).bfloat16()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    text = (
        "name: rows\n" + method + "models: [{{model: {a}, parameters: {{weight: 0.3}}}}, "
        "{{model: {b}, parameters: {{weight: 0.6}}}}]\n---\nmerge_method: linear\n"
        "models: [{{model: rows, parameters: {{weight: 2}}}}, "
        "{{model: {c}, parameters: {{weight: 1}}}}]\n"
    )
    read, kept = as_both(text.format(**models), tmp_path / "out")
    assert torch.equal(read["w.weight"], kept["w.weight"])


WRITTEN = """\
name: inner
merge_method: slerp
base_model: {base}
models: [{{model: {a}}}]
parameters: {{t: 0.5}}
---
merge_method: linear
models: [{{model: inner, parameters: {{weight: 2}}}}, {{model: {c}, parameters: {{weight: 1}}}}]
"""


def test_what_others_put_beside_the_intermediates_stays(
    models: dict[str, str], tmp_path: Path
) -> None:
    notes = tmp_path / "out.intermediates" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    pymerge.merge_documents(WRITTEN.format(**models), tmp_path / "out", memory="256MiB")
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_a_finished_output_is_known_again(models: dict[str, str], tmp_path: Path) -> None:
    """Though what it was merged of has to be written anew."""
    for expected in (False, True):
        done = pymerge.merge_documents(WRITTEN.format(**models), tmp_path / "out", memory="256MiB")
        report = done.reports[None]
        assert report is not None
        assert report.done_before is expected
        assert not (tmp_path / "out.intermediates").exists()


def test_the_hash_covers_what_an_inner_document_computes_in(models: dict[str, str]) -> None:
    """With mergekit's numerics the bytes depend on it."""
    text = (
        "name: inner\nmerge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: 1}}}}]\n"
    )
    after = "\n---\nmerge_method: linear\nmodels: [{{model: inner, parameters: {{weight: 1}}}}]\n"
    hashes = set()
    for working in ("bfloat16", "float32"):
        dtypes = f"dtype: {working}\nout_dtype: bfloat16"
        recipe, opened = api.load_documents((text + dtypes + after).format(**models))
        hashes.add(api.plan(recipe, opened=opened).hash)
    assert len(hashes) == 2
