"""Small checkpoints written byte by byte, recipes over them, and the real command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pymerge import api
from pymerge.engine.journal import Journal, Record
from pymerge.engine.output import Output

JOURNAL = ".pymerge-journal"
COMMAND = Path(sys.executable).with_name("pymerge")


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    format: str
    shape: tuple[int, ...]
    data: bytes


def bf16(values: np.ndarray) -> Raw:
    """Truncate to bfloat16: any bfloat16 will do for an input."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
    return Raw("BF16", np.shape(values), bits.astype(np.uint16).tobytes())


def write_file(path: Path, tensors: Mapping[str, Raw]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {
            "dtype": tensor.format,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def save_model(folder: Path, tensors: Mapping[str, Raw], shards: int = 1) -> Path:
    """A model folder with a config; more than one shard means an index."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"of": "' + folder.name + '"}')
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    where = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_file(folder / file_name, {name: tensors[name] for name in part})
        where.update(dict.fromkeys(part, file_name))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def model_tensors(
    seed: int, shapes: Mapping[str, tuple[int, ...]], change: float
) -> dict[str, Raw]:
    """A base (``change`` 0) or a fine-tune of it, in bfloat16."""
    base, tuned = np.random.default_rng(0), np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        values = base.normal(0, 0.02, shape)
        values = values + change * tuned.standard_t(4, shape)
        found[name] = bf16(values)
    return found


def layers(count: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (3 * width, width)}
    for layer in range(count):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "mlp.up_proj.weight": (2 * width, width),
            prefix + "self_attn.q_proj.weight": (width, width - 3),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (3 * width, width)}


class Models:
    """Checkpoints that fit together: a base and fine-tunes of it."""

    def __init__(self, base: Path, tuned: list[Path]) -> None:
        self.base = base
        self.tuned = tuned

    def recipe(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A recipe of ``linear``, ``task_arithmetic``, ``ties``, ``passthrough`` or ``emr``."""
        if method == "passthrough":
            return {"merge_method": method, "models": [{"model": str(self.base)}]}
        if method == "emr":
            tasks = [{"model": str(path)} for path in self.tuned]
            return {"merge_method": method, "base_model": str(self.base), "models": tasks}
        density = {"density": 0.3} if method == "ties" else {}
        models = [
            {"model": str(path), "parameters": {"weight": 0.3 + 0.2 * number, **density}}
            for number, path in enumerate(self.tuned)
        ]
        found: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
        if method != "linear":
            found["base_model"] = str(self.base)
        return found | ({"parameters": parameters} if parameters else {})


def make_models(folder: Path, shapes: Mapping[str, tuple[int, ...]], shards: int = 2) -> Models:
    base = save_model(folder / "base", model_tensors(0, shapes, 0.0), shards)
    tuned = [
        save_model(folder / f"tuned{seed}", model_tensors(seed, shapes, 1e-3), shards)
        for seed in (1, 2)
    ]
    return Models(base, tuned)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """9 tensors of up to 12,288 elements."""
    return make_models(tmp_path_factory.mktemp("small"), layers(2, 64))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """6 tensors of up to 768 elements."""
    return make_models(tmp_path_factory.mktemp("tiny"), layers(1, 16))


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """About 150 tensors, so that a merge has many moments."""
    return make_models(tmp_path_factory.mktemp("many"), layers(50, 96))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two tensors of more than a block each, and small ones."""
    return make_models(tmp_path_factory.mktemp("large"), layers(1, 331))


@pytest.fixture(scope="session")
def raw() -> Callable[..., Raw]:
    """Makes a tensor of a file: ``raw(format, shape, data)``."""
    return Raw


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """Writes a model folder: ``save(folder, {name: raw}, shards=1)``."""
    return save_model


@pytest.fixture(scope="session")
def as_bf16() -> Callable[[np.ndarray], Raw]:
    return bf16


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a folder."""
    return _digests


@pytest.fixture(scope="session")
def write_recipe() -> Callable[[Path, Mapping[str, Any]], Path]:
    def write(path: Path, recipe: Mapping[str, Any]) -> Path:
        path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        return path

    return write


@pytest.fixture(scope="session")
def start_command() -> Callable[..., subprocess.Popen[str]]:
    """Starts the installed command."""

    def start(*words: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **variables},
        )

    return start


@pytest.fixture(scope="session")
def command(start_command: Callable[..., Any]) -> Callable[..., tuple[int, str]]:
    """Runs the installed command to its end: exit code and everything it printed."""

    def run(*words: object, **variables: str) -> tuple[int, str]:
        process = start_command(*words, **variables)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed

    return run


def _check_unfinished(folder: Path, finished: Path) -> None:
    """What a stopped merge leaves is no model, unless it is the whole model to the last byte."""
    from safetensors import SafetensorError, safe_open

    marks = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    if any(mark.exists() for mark in marks):
        for path in finished.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    for path in (*folder.glob("model*.partial"), *folder.glob("tasks*.partial")):
        whole = finished / path.name.removesuffix(".partial")
        if path.read_bytes() == whole.read_bytes():
            continue
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass


@pytest.fixture(scope="session")
def check_unfinished() -> Callable[[Path, Path], None]:
    return _check_unfinished


@pytest.fixture
def child() -> Callable[[Callable[[], None]], int]:
    """Runs a function in a forked child; returns its exit code (100 where it raised)."""

    def run(function: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 100
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    return run


class Unplugged(Exception):
    """The interruption of these tests."""


@contextmanager
def _stop_after(num_tensors: int) -> Iterator[None]:
    """Let the merge inside fail once so many tensors are in the journal."""
    add, left = Journal.add, [num_tensors]

    def counted(self: Journal, name: str, record: Record) -> None:
        if left[0] == 0:
            raise Unplugged
        left[0] -= 1
        add(self, name, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(Unplugged):
            yield


@pytest.fixture
def stop_after() -> Any:
    """``with stop_after(n):`` lets the merge inside fail once n tensors are in the journal."""
    return _stop_after


@contextmanager
def _unfinished_commit() -> Iterator[None]:
    """Let the merge inside fail once all tensors are written."""

    def fail(self: Output, *args: Any) -> None:
        raise Unplugged

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "commit", fail)
        with pytest.raises(Unplugged):
            yield


@pytest.fixture
def unfinished_commit() -> Any:
    """``with unfinished_commit():`` lets the merge inside fail where it would commit."""
    return _unfinished_commit


@pytest.fixture
def stopped(small: Any, tmp_path: Path, digests: Any) -> Any:
    """A merge stopped after five tensors: (plan, folder, digests of the whole)."""
    plan = api.plan(small.recipe("ties"), memory=160 << 20, threads=1)
    api.merge(plan, tmp_path / "whole")
    with _stop_after(5):
        api.merge(plan, tmp_path / "out")
    lines = (tmp_path / "out" / JOURNAL).read_text().splitlines()
    assert len([line for line in lines if "tensor" in line]) == 5
    return plan, tmp_path / "out", digests(tmp_path / "whole")


@pytest.fixture
def copied(small: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe over private copies of the models, which a test may change."""
    folders = []
    for path in (small.base, *small.tuned):
        shutil.copytree(path, tmp_path / "models" / path.name)
        folders.append(str(tmp_path / "models" / path.name))
    models = [{"model": folder, "parameters": {"weight": 1.0}} for folder in folders]
    return {"merge_method": "linear", "models": models}
