"""The same bytes of random and of trimming methods whatever the tiles, threads, instruction sets
and backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pymerge
from pymerge import ops
from pymerge.in_memory import tiles as in_memory
from pymerge.methods import sparsify, trim
from pymerge.plan import memory

SHAPE = (61, 163)  # odd rows: spans, vectors and rows all end in the middle of one another
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dare_linear": ("dare_linear", {"density": 0.4}),
    "dare_linear-official": ("dare_linear", {"density": 0.4, "preset": "official"}),
    "dare_ties": ("dare_ties", {"density": [0.2, 1.0, 0.7], "normalize": True}),
    "della": ("della", {"density": 0.4}),
    "della-official": ("della", {"density": 0.4, "epsilon": 0.2, "preset": "official"}),
    "della_linear": ("della_linear", {"density": [0.2, 1.0, 0.0]}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.3, "gamma": 0.05, "rescale": True}),
    "breadcrumbs-rows": ("breadcrumbs", {"density": 0.3, "preset": "official", "rescale": True}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1}),
    "sce": ("sce", {"select_topk": 0.3}),
    "sce-official": ("sce", {"select_topk": 0.3, "preset": "official"}),
    "ties-rescale": ("ties", {"density": 0.3, "rescale": True, "zero_sign": "majority"}),
    "ties-official": ("ties", {"preset": "official"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def isas() -> Iterator[list[str]]:
    before = ops.isa()
    yield ops.available_isas()
    ops.use_isa(before)


def merge(case: str, **options: Any) -> np.ndarray:
    """The result on bfloat16-like values, in three formats, full of equal magnitudes."""
    method, parameters = CASES[case]
    random = np.random.default_rng(2)
    base = (random.integers(-400, 401, SHAPE) / 8192).astype(np.float32)
    tuned = [
        (base + random.integers(-30, 31, SHAPE) / 8192).astype(dtype)
        for dtype in (np.float32, np.float16, np.float64)
    ]
    weight = {} if method == "sce" else {"weight": [0.5, 0.3, 0.7]}
    return np.asarray(
        pymerge.merge_tensor(
            method,
            base,
            tuned,
            out_dtype="float32",
            **({"name": "w"} | weight | parameters | options),
        )
    )


def test_tiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one span, of three, and of the whole; scratch of a few rows, or of a span."""
    whole = merge(case, backend="reference")
    for tile, scratch in ((4096, 4096), (3 * 4096, 8192), (1 << 19, 4096)):
        monkeypatch.setattr(in_memory, "TILE_ELEMENTS", tile)
        monkeypatch.setattr(sparsify, "SCRATCH", scratch)
        monkeypatch.setattr(trim, "COLLECT_LIMIT", 0)
        assert np.array_equal(merge(case, backend="reference"), whole), (tile, scratch)


def test_dare_in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sums not even the spans matter: a mask is a function of the index alone."""
    whole = merge("dare_linear-official", backend="reference")
    for tile in (37, 1001):
        monkeypatch.setattr(in_memory, "TILE_ELEMENTS", tile)
        found = merge("dare_linear-official", backend="reference")
        assert np.array_equal(found, whole), tile


def test_threads_and_instruction_sets(
    case: str, isas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge(case, backend="reference")
    monkeypatch.setattr(in_memory, "TILE_ELEMENTS", 4096)
    for isa in isas:
        ops.use_isa(isa)
        for threads in (1, 2, 5):
            found = merge(case, backend="cpu", threads=threads)
            assert np.array_equal(found, whole), (isa, threads)


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_another_seed_is_another_result(name: str) -> None:
    assert not np.array_equal(
        merge(name, backend="reference"), merge(name, backend="reference", seed=1)
    )


def test_a_mask_is_the_tensors_own() -> None:
    """Another name draws another mask; a model keeps its mask beside other models."""
    assert not np.array_equal(
        merge("dare_linear", backend="reference"),
        merge("dare_linear", backend="reference", name="v"),
    )
    both = [
        merge("dare_linear-official", backend="reference", weight=[0.5, other, 0.0])
        for other in (0.0, 0.25)
    ]
    second = merge("dare_linear-official", backend="reference", weight=[0.0, 0.25, 0.0])
    base = merge("dare_linear-official", backend="reference", weight=[0.0, 0.0, 0.0])
    np.testing.assert_allclose(both[1] - both[0], second - base, atol=2**-22)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models whose largest tensor takes several of the smallest tiles."""
    random = np.random.default_rng(8)
    shapes = {"layers.0.w": (300, 163), "layers.1.w": (163,), "norm": (4100, 1), "scalar": ()}
    base = {name: random.integers(-400, 401, shape) / 8192 for name, shape in shapes.items()}
    folders = []
    for number in range(4):
        tensors = {
            name: np.asarray(
                value + (number > 0) * random.integers(-30, 31, value.shape) / 8192, np.float32
            )
            for name, value in ((name, np.asarray(value)) for name, value in base.items())
        }
        folders.append(tmp_path_factory.mktemp("checkpoint"))
        save_file(tensors, folders[-1] / "model.safetensors")
    return folders


def test_streamed_is_resident(
    case: str, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files: tensors held whole, and tensors too large for the memory, read at every look."""
    method, parameters = CASES[case]
    own = {"weight": [0.5, 0.3, 0.7]} if method != "sce" else {}
    split = {name: value for name, value in parameters.items() if isinstance(value, list)}
    recipe = {
        "merge_method": method,
        "base_model": str(checkpoints[0]),
        "models": [
            {
                "model": str(folder),
                "parameters": {name: values[i] for name, values in (own | split).items()},
            }
            for i, folder in enumerate(checkpoints[1:])
        ],
        "parameters": {name: value for name, value in parameters.items() if name not in split},
    }
    pymerge.merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(memory, "LARGEST_BLOCK", memory.SMALLEST_BLOCK)
    monkeypatch.setattr(memory, "SMALLEST_ARENA", 1 << 16)
    monkeypatch.setattr(memory, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(memory, "SELECTION_SHARE", 1 << 60)
    monkeypatch.setattr(memory, "TABLE_BYTES", 0)
    monkeypatch.setattr(memory, "RANK_BYTES", 0)
    monkeypatch.setattr(memory, "SCORE_BYTES", 0)
    for threads in (1, 2):
        plan = pymerge.plan(recipe, memory=1 << 20, threads=threads)
        largest = max(plan.jobs, key=plan.tiling.num_tiles)
        assert plan.tiling.num_tiles(largest) > 4
        assert not plan.tiling.is_resident(largest)
        pymerge.merge(plan, tmp_path / str(threads))
        whole, streamed = (
            (tmp_path / folder / "model.safetensors").read_bytes()
            for folder in ("whole", str(threads))
        )
        assert streamed == whole, threads
