"""Methods that look at whole rows, where a row is longer than a tile of other methods."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pymerge import api
from pymerge.errors import PlanError
from pymerge.plan import memory

LONG = 30_000_000


def sparse_model(folder: Path, shape: tuple[int, ...]) -> Path:
    """A bfloat16 model whose data are a hole in the file: planning reads only the header."""
    size = 2
    for extent in shape:
        size *= extent
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}})
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        text = header.encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    (folder / "config.json").write_text("{}")
    return folder


def recipe(folder: Path, shape: tuple[int, ...], method: str) -> dict[str, Any]:
    names = [str(sparse_model(folder / name, shape)) for name in ("base", "a", "b")]
    own = {"weight": 0.5, "density": 0.5}
    return {
        "merge_method": method,
        "base_model": names[0],
        "models": [{"model": name, "parameters": own} for name in names[1:]],
    }


def test_the_error_says_what_is_enough(tmp_path: Path) -> None:
    document = recipe(tmp_path, (LONG,), "della")
    with pytest.raises(PlanError, match=r"whole rows, and those of tensor 'w' have 30000000") as e:
        api.plan(document, memory="512MiB", threads=2)
    needed = re.search(r"give at least (\d+) MiB", str(e.value))
    assert needed is not None
    with pytest.raises(PlanError):
        api.plan(document, memory=(int(needed[1]) // 2) << 20, threads=2)
    plan = api.plan(document, memory=int(needed[1]) << 20, threads=2)
    assert plan.tiling.tile_elements(plan.jobs[0]) == LONG


def test_a_long_row_is_no_matter_to_other_methods(tmp_path: Path) -> None:
    plan = api.plan(recipe(tmp_path, (LONG,), "dare_ties"), memory="256MiB", threads=2)
    assert plan.tiling.block_bytes <= memory.LARGEST_BLOCK


@pytest.mark.parametrize("columns", [1, 7, 4095, 4096, 28_672])
def test_tiles_are_whole_rows(tmp_path: Path, columns: int) -> None:
    plan = api.plan(recipe(tmp_path, (9000, columns), "della"), memory="512MiB", threads=2)
    (job,) = plan.jobs
    assert plan.tiling.tile_elements(job) % columns == 0
    assert plan.tiling.tile_elements(job) * 2 <= plan.tiling.block_bytes
