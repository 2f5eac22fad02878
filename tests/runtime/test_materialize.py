"""Naming a task, and writing its model as a checkpoint of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.engine.journal import Journal
from pymerge.errors import CheckpointError, PymergeError
from pymerge.runtime.task_folder import open_tasks


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )


def materialize(out: Path, task: Any, dest: Path, **options: Any) -> dict[str, torch.Tensor]:
    pymerge.materialize(out, task, dest, **{"backend": "reference", **options})
    assert pymerge.verify(dest).ok
    found: dict[str, torch.Tensor] = {}
    for path in sorted(dest.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_is_what_is_loaded(merged: Any, tmp_path: Path, number: int) -> None:
    tasks, out = merged
    dest = tmp_path / "dest"
    found = materialize(out, number, dest, memory="160MiB", threads=2)
    assert same(found, pymerge.load_task(out, number, backend="reference"))
    assert not same(found, tasks.base_tensors)
    assert (dest / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert (dest / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert f"task-{number}" in (dest / "README.md").read_text()
    manifest = json.loads((dest / "pymerge_manifest.json").read_text())
    inputs = [file["name"] for file in manifest["inputs"][0]["files"]]
    assert inputs == ["model.safetensors", "tasks.safetensors"]
    assert not list(dest.glob("tasks*"))


def test_bytes_depend_on_nothing_else(merged: Any, tmp_path: Path) -> None:
    _, out = merged
    few = materialize(out, 1, tmp_path / "few", memory="160MiB", threads=1, shard_size="8KB")
    many = materialize(out, 1, tmp_path / "many", memory="2GiB", threads=3)
    assert len(list((tmp_path / "few").glob("model-*.safetensors"))) > 1
    assert same(few, many)


def test_continues(merged: Any, tmp_path: Path) -> None:
    _, out = merged
    dest = tmp_path / "dest"
    add, left = Journal.add, [3]

    def stop(self: Journal, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyError("unplugged")
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        with pytest.raises(KeyError, match="unplugged"):
            materialize(out, 0, dest)
    report = pymerge.materialize(out, 0, dest, backend="reference")
    assert report.num_resumed == 3
    assert same(load_file(dest / "model.safetensors"), pymerge.load_task(out, 0))
    with pytest.raises(PymergeError, match="overwrite"):
        pymerge.materialize(out, 1, dest, backend="reference")


def test_tasks_by_name_number_and_part(merged: Any) -> None:
    tasks, out = merged
    folder = open_tasks(out)
    for number, path in enumerate(tasks.folders):
        for wanted in (number, str(number), str(path), path.name, f"k-{number}"):
            assert folder.find(wanted).number == number, wanted


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ("task", "3 tasks fit 'task'"),
        ("finance", "no task 'finance'"),
        ("", "no task ''"),
        (3, "no task 3"),
        (-1, "no task -1"),
    ],
)
def test_other_tasks_are_refused(merged: Any, wanted: Any, what: str) -> None:
    tasks, out = merged
    with pytest.raises(PymergeError) as error:
        pymerge.load_task(out, wanted)
    assert what in str(error.value)
    for number, path in enumerate(tasks.folders):
        assert f"{number}: {path}" in str(error.value)


def test_exact_name_wins_over_a_part(make_tasks: Any, save_model: Any, tmp_path: Path) -> None:
    tasks = make_tasks(2)
    longer = save_model(tasks.folders[0].with_name("task-01"), tasks.tensors[1])
    recipe = tasks.recipe("tall_masks")
    recipe["models"][0]["model"] = str(longer)
    recipe["models"][1]["model"] = str(tasks.folders[0])
    pymerge.merge(recipe, tmp_path / "out", backend="reference")
    assert open_tasks(tmp_path / "out").find("task-0").number == 1
    assert open_tasks(tmp_path / "out").find("task-01").number == 0


def test_other_folders_are_refused(merged: Any) -> None:
    tasks, _ = merged
    with pytest.raises(CheckpointError, match=r"expected tasks\.json.*emr.*loads as it is"):
        pymerge.load_task(tasks.base, 0)


def test_destination_must_not_be_the_source(merged: Any, tmp_path: Path) -> None:
    _, out = merged
    shutil.copytree(out, tmp_path / "out")
    with pytest.raises(PymergeError, match="another output folder"):
        materialize(tmp_path / "out", 0, tmp_path / "out", overwrite=True)


DAMAGES = {
    "no shard": lambda folder, text: (folder / "tasks.safetensors").unlink(),
    "format": lambda folder, text: text.update(format=2),
    "no tasks": lambda folder, text: text.update(tasks=[]),
    "scale": lambda folder, text: text["tasks"][1].update(scale="1"),
    "nan": lambda folder, text: text["tasks"][1].update(scale=float("nan")),
    "file elsewhere": lambda folder, text: text.update(files=["../tasks.safetensors"]),
    "file without a name": lambda folder, text: text.update(files=[1]),
    "task left out": lambda folder, text: text["tasks"].pop(),
    "rows": lambda folder, text: text.update(rows={"lm_head.weight": [0, 1]}),
    "rows of none": lambda folder, text: text.update(rows={"lm_head.weight": [0, 1, 7]}),
    "no object": lambda folder, text: text.update(rows=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder(merged: Any, tmp_path: Path, damage: str) -> None:
    _, out = merged
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    text = json.loads((folder / "tasks.json").read_text())
    DAMAGES[damage](folder, text)
    (folder / "tasks.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError) as error:
        pymerge.load_task(folder, 0)
    assert str(folder) in str(error.value)


def test_command(merged: Any, tmp_path: Path, run_pymerge: Any) -> None:
    _, out = merged
    done = run_pymerge("inspect", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a model for each task by emr" in done.stdout
    assert "task-2" in done.stdout
    words = ("materialize", str(out), "task-2", "dest", "--memory", "200MiB")
    done = run_pymerge(*words, "--backend", "reference", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "dest" / "model.safetensors")
    assert same(found, pymerge.load_task(out, 2, backend="reference"))
    done = run_pymerge("materialize", str(out), "nobody", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert "its tasks are 0:" in done.stderr
    assert not (tmp_path / "other").exists()
