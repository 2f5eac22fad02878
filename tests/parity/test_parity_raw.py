"""Bare files of weights through mergekit-pytorch and through ``pymerge raw``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pymerge = pytest.importorskip("pymerge")

DRIVER = Path(__file__).with_name("drive_mergekit_commands.py")

#: Name -> recipe, mergekit's options, ours. {x} stands for the file x.
JOBS = {
    "linear": (
        """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: [0.25, 3.0]}}
          - {model: {b}, parameters: {weight: [{filter: up, value: 0.5}, {value: 2.0}]}}
        dtype: float32
        """,
        [],
        "same",
    ),
    "task-arithmetic": (
        """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {b}, parameters: {weight: 0.25}}
        parameters: {lambda: 1.5}
        dtype: float32
        out_dtype: float16
        """,
        [],
        "same",
    ),
    "intersection": (
        """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 1.0}}
          - {model: {less}, parameters: {weight: 0.5}}
          - {model: {more}, parameters: {weight: 0.75}}
        dtype: float32
        """,
        ["-i"],
        "intersection",
    ),
    "union": (
        """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 1.0}}
          - {model: {less}, parameters: {weight: 0.5}}
          - {model: {more}, parameters: {weight: 0.75}}
        dtype: float32
        """,
        ["--tensor-union"],
        "union",
    ),
    "pickled": (
        """
        merge_method: slerp
        base_model: {base}
        models: [{model: {pickled}}]
        parameters: {t: 0.375}
        dtype: float32
        """,
        [],
        "same",
    ),
}


def checkpoint(seed: int, *, without: str = "", more: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"net.0.up": (6, 4), "net.1.up": (6, 4), "net.1.down": (4, 6), "scale": (4,)}
    shapes |= {more: (3, 3)} if more else {}
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if name != without
    }


@pytest.fixture(scope="module")
def work(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.yml of every job and mergekit's NAME/model.safetensors."""
    folder = tmp_path_factory.mktemp("raw")
    files = {
        "base": checkpoint(0),
        "a": checkpoint(1),
        "b": checkpoint(2),
        "less": checkpoint(3, without="net.1.down"),
        "more": checkpoint(4, more="extra"),
    }
    paths = {name: folder / f"{name}.safetensors" for name in files}
    for name, tensors in files.items():
        save_file(tensors, paths[name], {"format": "pt"})
    paths["pickled"] = folder / "pickled.pt"
    torch.save(checkpoint(5), paths["pickled"])
    jobs = []
    for name, (text, options, _) in JOBS.items():
        for model, path in paths.items():
            text = text.replace(f"{{{model}}}", str(path))
        recipe = folder / f"{name}.yml"
        recipe.write_text(text)
        arguments = [str(recipe), str(folder / name), "--quiet", *options]
        error = str(folder / f"{name}.error")
        jobs.append({"command": "mergekit-pytorch", "arguments": arguments, "error": error})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}
    subprocess.run([peers_python, DRIVER, folder / "jobs.json"], check=True, env=environment)
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_files_merge_as_mergekit_pytorch_merges_them(work: Path, name: str) -> None:
    error = work / f"{name}.error"
    assert not error.exists(), error.read_text()
    out = work / f"{name}.safetensors"
    pymerge.merge_raw(work / f"{name}.yml", out, names=JOBS[name][2], allow_pickle=True)
    theirs, ours = load_file(work / name / "model.safetensors"), load_file(out)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype
        tolerance = {"rtol": 2**-10 if expected.dtype == torch.float16 else 1e-6, "atol": 1e-6}
        torch.testing.assert_close(ours[tensor], expected, **tolerance, msg=tensor)
