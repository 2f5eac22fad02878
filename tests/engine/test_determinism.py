"""The same bytes whatever the threads, memory, tiles, instruction sets and ways to read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pymerge import api, ops
from pymerge.engine.sources import METHODS
from pymerge.plan import memory

SLACK = 8192
RECIPES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "linear": lambda models: models.recipe("linear"),
    "task_arithmetic": lambda models: models.recipe("task_arithmetic"),
    "ties": lambda models: models.recipe("ties"),
    "ties-model": lambda models: models.recipe("ties", trim_scope="model"),
    "passthrough": lambda models: models.recipe("passthrough"),
    "convert": lambda models: {**models.recipe("passthrough"), "dtype": "float64"},
}


@pytest.fixture(scope="module")
def wholes(
    large: Any, tmp_path_factory: pytest.TempPathFactory, digests: Any
) -> Callable[[str], dict[str, str]]:
    """What each recipe gives with one thread and whole tensors."""
    found: dict[str, dict[str, str]] = {}

    def whole(name: str) -> dict[str, str]:
        if name not in found:
            out = tmp_path_factory.mktemp("whole") / name
            api.merge(RECIPES[name](large), out, memory="1GiB", threads=1)
            found[name] = digests(out)
        return found[name]

    return whole


@pytest.mark.parametrize("name", RECIPES)
def test_threads_and_budgets(
    large: Any, tmp_path: Path, digests: Any, wholes: Any, name: str
) -> None:
    for threads, budget in itertools.product((1, 2, 5), ("128MiB", "4GiB")):
        out = tmp_path / f"{threads}-{budget}"
        api.merge(RECIPES[name](large), out, threads=threads, memory=budget)
        assert digests(out) == wholes(name), (threads, budget)


@pytest.mark.parametrize("name", ["ties", "ties-model"])
def test_options_of_the_command(
    large: Any, tmp_path: Path, write_recipe: Any, command: Any, digests: Any, name: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", RECIPES[name](large))
    for threads, budget in ((1, "128MiB"), (2, "4GiB")):
        options = ["--threads", threads, "--memory", budget]
        code, printed = command("merge", recipe, tmp_path / budget, *options)
        assert code == 0, printed
    assert digests(tmp_path / "128MiB") == digests(tmp_path / "4GiB")


def small_tiles(
    patch: pytest.MonkeyPatch, block_bytes: int, arena_bytes: int, whole_pages: bool
) -> None:
    """Cut memory so that even small tensors are streamed, in tiles of any number of elements."""
    patch.setattr(memory, "LARGEST_BLOCK", block_bytes + SLACK)
    patch.setattr(memory, "SMALLEST_BLOCK", 1)
    patch.setattr(memory, "SMALLEST_ARENA", arena_bytes)
    patch.setattr(memory, "OVERHEAD_BYTES", 0)
    patch.setattr(memory, "SELECTION_SHARE", 1 << 60)
    patch.setattr(memory, "TABLE_BYTES", 0)
    if not whole_pages:
        patch.setattr(memory, "PAGE", 2)


def most_bytes(plan: Any) -> int:
    """What a run may read: the plan's looks, and what it takes to place equal magnitudes.

    Each model may need one more tile of each tensor, and with a rank over the whole model one
    tensor in which its ties are split.
    """
    models = max(len(job.models) for job in plan.jobs)
    tiles = sum(
        plan.tiling.tile_elements(job) * sum(entry.format.num_bytes for entry in job.sources)
        for job in plan.streamed
    )
    split = max(job.source_bytes for job in plan.jobs) if plan.model_wide else 0
    return int(plan.bytes_read + models * (tiles + split))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("block_bytes", "num_blocks", "whole_pages"),
    [(65536, 16, True), (4096, 400, True), (4096, 24, True), (502, 40, False), (46, 24, False)],
    ids=["64K", "4K-resident", "4K", "odd", "tiny"],
)
def test_tiles(
    large: Any,
    small: Any,
    tiny: Any,
    tmp_path: Path,
    digests: Any,
    wholes: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    block_bytes: int,
    num_blocks: int,
    whole_pages: bool,
) -> None:
    """Tiles of 46 bytes hold 23 elements of 2 bytes; few blocks leave no tensor resident."""
    models = large if block_bytes > 4096 else small if block_bytes > 502 else tiny
    if models is large:
        whole = wholes(name)
    else:
        api.merge(RECIPES[name](models), tmp_path / "whole", threads=1)
        whole = digests(tmp_path / "whole")
    arena = (block_bytes + SLACK) * num_blocks
    small_tiles(monkeypatch, block_bytes, arena, whole_pages)
    for threads in (1, 3):
        decided = api.plan(RECIPES[name](models), memory=arena, threads=threads)
        assert max(map(decided.tiling.num_tiles, decided.jobs)) > 2
        report = api.merge(decided, tmp_path / str(threads))
        assert digests(tmp_path / str(threads)) == whole
        assert report.bytes_read <= most_bytes(decided)


@pytest.mark.parametrize("name", ["linear", "ties", "ties-model", "convert"])
def test_instruction_sets(large: Any, tmp_path: Path, digests: Any, wholes: Any, name: str) -> None:
    before = ops.isa()
    try:
        for isa in ops.available_isas():
            ops.use_isa(isa)
            api.merge(RECIPES[name](large), tmp_path / isa)
            assert digests(tmp_path / isa) == wholes(name), isa
    finally:
        ops.use_isa(before)


def test_instruction_set_by_the_environment(
    small: Any, tmp_path: Path, write_recipe: Any, command: Any, digests: Any
) -> None:
    recipe = write_recipe(tmp_path / "ties.yml", small.recipe("ties"))
    for isa in ("scalar", ops.available_isas()[-1]):
        code, printed = command("merge", recipe, tmp_path / isa, PYMERGE_ISA=isa)
        assert code == 0, printed
    found = [digests(tmp_path / isa) for isa in ("scalar", ops.available_isas()[-1])]
    assert found[0] == found[-1]


@pytest.mark.parametrize("method", METHODS)
def test_ways_to_read(large: Any, tmp_path: Path, digests: Any, wholes: Any, method: str) -> None:
    for name in ("linear", "ties", "passthrough"):
        report = api.merge(
            RECIPES[name](large), tmp_path / name, read_method=method, cache_output=False
        )
        assert list(report.read_methods) == [method]
        assert digests(tmp_path / name) == wholes(name)


def test_output_kept_or_dropped_and_not_synced(
    large: Any, tmp_path: Path, digests: Any, wholes: Any
) -> None:
    for number, (keep, sync) in enumerate(itertools.product((True, False), repeat=2)):
        out = tmp_path / str(number)
        api.merge(large.recipe("linear"), out, cache_output=keep, sync=sync)
        assert digests(out) == wholes("linear")


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_order_of_tensors_in_the_sources(
    small: Any, tmp_path: Path, save: Any, raw: Any, name: str
) -> None:
    """Models whose files hold the same tensors in another order and in other shards."""

    def reordered(folder: Path, target: Path, shards: int) -> Path:
        tensors = {}
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            for key, entry in json.loads(content[8 : 8 + length]).items():
                if key != "__metadata__":
                    begin, end = (8 + length + offset for offset in entry["data_offsets"])
                    tensors[key] = raw(entry["dtype"], tuple(entry["shape"]), content[begin:end])
        order = np.random.default_rng(shards).permutation(sorted(tensors))
        return save(target, {key: tensors[key] for key in order}, shards)

    recipe = RECIPES[name](small)
    api.merge(recipe, tmp_path / "whole")
    text = json.dumps(recipe)
    for shards, folder in enumerate((*small.tuned, small.base), start=1):
        there = reordered(folder, tmp_path / "models" / folder.name, shards)
        text = text.replace(str(folder), str(there))
    api.merge(json.loads(text), tmp_path / "out")
    whole = values(tmp_path / "whole")
    found = values(tmp_path / "out")
    assert found.keys() == whole.keys()
    assert all(found[key] == whole[key] for key in whole)


def values(folder: Path) -> Mapping[str, bytes]:
    """Tensor name → bytes, read by our own hands: numpy knows no bfloat16."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for key, entry in json.loads(content[8 : 8 + length]).items():
            if key != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[key] = content[begin:end]
    return found


def test_values_are_those_of_the_reference(small: Any, tmp_path: Path) -> None:
    """The whole pipeline against the naive sum of the files' numbers."""
    recipe = {**small.recipe("linear"), "dtype": "float32"}
    api.merge(recipe, tmp_path / "out")
    inputs = [values(folder) for folder in small.tuned]
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, array in found.items():
        first, second = (
            (np.frombuffer(data[key], np.uint16).astype(np.uint32) << 16).view(np.float32)
            for data in inputs
        )
        total = np.float32(0.3) * first + np.float32(0.5) * second
        expected = total / np.float32(0.3 + 0.5)
        np.testing.assert_array_equal(array.ravel(), expected)
