"""``pymerge raw``: one file of weights from several, by tensor names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.errors import CheckpointError, PlanError, PymergeError, RecipeError


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``a``: x and y of ones; ``b``: x of threes, z of fives; ``recipe.yml``, their mean."""
    save_file({"x": torch.ones(4), "y": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.full((4,), 3.0), "z": torch.full((3,), 5.0)}, tmp_path / "b.safetensors")
    save_file({"x": torch.full((4,), 5.0), "y": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels:\n- model: a.safetensors\n- model: b.safetensors\n"
        "parameters: {weight: [1.0, 9.0]}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_different_names_are_refused_with_what_to_do(files: Path) -> None:
    with pytest.raises(PlanError, match=r"found 2 .*--tensor-intersection.*--tensor-union") as got:
        pymerge.merge_raw("recipe.yml", "out.safetensors")
    assert "y: missing in b.safetensors" in str(got.value)
    assert "z: missing in a.safetensors" in str(got.value)
    assert not list(files.glob("*out*"))


def test_intersection_and_union_merge_what_is_there(files: Path) -> None:
    pymerge.merge_raw("recipe.yml", "both.safetensors", names="intersection")
    assert {k: t.tolist() for k, t in load_file("both.safetensors").items()} == {"x": [2.0] * 4}
    pymerge.merge_raw("recipe.yml", "all.safetensors", names="union")
    merged = load_file("all.safetensors")
    assert merged["x"].tolist() == [2.0] * 4
    assert merged["y"].tolist() == [[1.0, 1.0]] * 2
    assert merged["z"].tolist() == [5.0] * 3
    assert sorted(path.name for path in files.iterdir() if "pymerge" in path.name) == []


def test_a_tensor_without_a_base_has_no_task_vector(files: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "a.safetensors",
        "models": [{"model": "b.safetensors", "parameters": {"weight": 1.0}}],
    }
    with pytest.raises(PlanError, match=r"'z' is missing in the base model a\.safetensors"):
        pymerge.merge_raw(recipe, "out.safetensors", names="union")


def test_an_existing_file_stays_unless_told(files: Path) -> None:
    Path("out.safetensors").write_bytes(b"mine")
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": "a.safetensors"}],
    }
    with pytest.raises(PlanError, match="exists already; choose another name or give --overwrite"):
        pymerge.merge_raw(recipe, "out.safetensors")
    assert Path("out.safetensors").read_bytes() == b"mine"
    pymerge.merge_raw(recipe, "out.safetensors", overwrite=True)
    assert load_file("out.safetensors")["x"].tolist() == [1.0] * 4


def test_a_merge_that_stopped_before_the_file_was_moved_continues(files: Path) -> None:
    """The state between the steps: the finished work folder, and after the move an empty one."""
    from pymerge.engine import run_plan
    from pymerge.raw import plan_raw

    planned = plan_raw("recipe.yml", names="intersection")
    work = files / ".out.safetensors.pymerge"
    run_plan(planned, work, side_files={})
    with pytest.raises(PlanError, match="give --overwrite"):
        pymerge.merge_raw("recipe.yml", "out.safetensors", names="union")
    report = pymerge.merge_raw("recipe.yml", "out.safetensors", names="intersection")
    assert report.done_before
    assert load_file("out.safetensors")["x"].tolist() == [2.0] * 4
    run_plan(planned, work, side_files={})
    (work / "model.safetensors").unlink()
    pymerge.merge_raw("recipe.yml", "out.safetensors", names="intersection", overwrite=True)
    assert load_file("out.safetensors")["x"].tolist() == [2.0] * 4
    assert not work.exists()


@pytest.mark.parametrize("name", ["out", "out.bin", "out.safetensors/"])
def test_the_output_is_one_safetensors_file(files: Path, name: str) -> None:
    (files / "out.safetensors").mkdir()
    with pytest.raises(PlanError, match=r"expected (an output file that ends in|a file to write)"):
        pymerge.merge_raw("recipe.yml", name, names="union")


def test_what_bare_files_have_not_is_refused(files: Path) -> None:
    slices = [{"sources": [{"model": "a.safetensors", "layer_range": [0, 1]}]}]
    with pytest.raises(RecipeError, match="takes models, found modules or slices"):
        pymerge.merge_raw({"merge_method": "passthrough", "slices": slices}, "out.safetensors")
    recipe = {"merge_method": "passthrough", "models": [{"model": "a.safetensors"}]}
    with pytest.raises(RecipeError, match="writes no tokenizer"):
        pymerge.merge_raw({**recipe, "tokenizer_source": "base"}, "out.safetensors")
    torch.save({"state_dict": {"x": torch.ones(2)}}, "a.ckpt")
    recipe = {"merge_method": "passthrough", "models": [{"model": "a.ckpt"}]}
    with pytest.raises(CheckpointError, match="give --allow-pickle"):
        pymerge.merge_raw(recipe, "out.safetensors")
    pymerge.merge_raw(recipe, "out.safetensors", allow_pickle=True)
    assert load_file("out.safetensors")["x"].tolist() == [1.0] * 2


def test_the_command_takes_one_rule_for_names(
    files: Path, run_pymerge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_pymerge("raw", "recipe.yml", "out.safetensors", "-i", "-u", cwd=files)
    assert done.returncode == 2
    assert "at most one of --tensor-intersection and --tensor-union" in done.stderr
    done = run_pymerge("raw", "recipe.yml", "out.safetensors", "-u", cwd=files)
    assert done.returncode == 0, done.stderr
    assert "warning: 2 tensors not in all files" in done.stderr
    assert set(load_file("out.safetensors")) == {"x", "y", "z"}


def test_an_input_is_never_replaced(files: Path) -> None:
    before = Path("a.safetensors").read_bytes()
    with pytest.raises(PlanError, match=r"is the input 'a\.safetensors'"):
        pymerge.merge_raw("recipe.yml", files / "a.safetensors", names="union", overwrite=True)
    assert Path("a.safetensors").read_bytes() == before


def test_a_method_that_writes_more_than_a_model_is_refused(files: Path) -> None:
    recipe = {
        "merge_method": "emr",
        "base_model": "a.safetensors",
        "models": [{"model": "c.safetensors"}],
    }
    with pytest.raises(RecipeError, match=r"found emr, which puts more beside"):
        pymerge.merge_raw(recipe, "out.safetensors", names="intersection")


def test_options_of_a_run_are_those_of_a_merge(files: Path) -> None:
    save_file({"x": torch.full((4,), torch.inf), "y": torch.zeros(2, 2)}, "c.safetensors")
    recipe = {"merge_method": "passthrough", "models": [{"model": "c.safetensors"}]}
    options = {"non_finite": "fail", "sync": False, "cache_output": True, "trace": "trace.json"}
    with pytest.raises(PymergeError, match="non-finite"):
        pymerge.merge_raw(recipe, "out.safetensors", run=options)
    assert Path("trace.json").exists()
    assert not Path("out.safetensors").exists()
