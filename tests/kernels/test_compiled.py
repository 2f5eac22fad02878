"""The Triton kernels compiled for GPUs on a machine without one: vectors, registers, contraction.

What is compiled is what the launchers launch, see compiling.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted", allow_module_level=True)

from compiling import ALIGNED, FAMILIES, NUM, Compiled, NoRoom, compiled, launches_of, views

from pymerge.formats import BY_CODE, F32
from pymerge.ops.selection import Keep

K: Any = {name: importlib.import_module(f"pymerge.kernels.{name}") for name in FAMILIES}
ARCHITECTURES = (80, 90)
#: Shared memory that a block can have on every device of compute capability 8 and 9.
MOST_SHARED_BYTES = 99 * 1024

OUT, BASE, *MODELS = views(6)
MANY = views(17)
COLUMNS = 4096
ROWS = NUM // COLUMNS
KEEPS = [Keep(5, 7, 2**30, 4, 2**20, 11)] * 4
PLAIN: dict[str, Any] = {
    **{"elect": "weighted", "zero_sign": 1, "combine": "mean", "factors": None},
    **{"divisor": 1.0, "scale": 1.0, "score": None, "deltas": False},
}


def table(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def axpy_n(inputs: Any = MODELS, out: Any = OUT, base: Any = BASE) -> Any:
    return K["axpy"].axpy_n(out, inputs, [0.5] * len(inputs), base, 1.0, 1.0, True)


def merge(models: Any = MODELS, keep: Keep = KEEPS[0], out: Any = OUT, **options: Any) -> Any:
    weights, keeps = [0.5] * len(models), [keep] * len(models)
    arguments = (out, BASE, models, weights, keeps, 0)
    return K["merge"].disjoint_merge(*arguments, **{**PLAIN, **options})


def histogram(bins: int, shift: int, prefix: list[int] | None, top: int) -> Any:
    counts = np.zeros((4, bins), np.uint64)
    return K["selection"].magnitude_histogram(BASE, MODELS, counts, shift, prefix, top)


def sparsify(columns: int) -> Any:
    return K["rows"].row_sparsify(
        OUT,
        BASE,
        MODELS[0],
        0,
        columns=columns,
        num_rows=NUM // columns,
        first=0,
        last=columns,
        draws_low=5,
        draws_span=7,
        seed=2**63 + 1,
        rescale=True,
    )


def mapped(op: str, models: Any = MODELS, **options: Any) -> Any:
    module = K["elementwise"]
    return module.map_models(getattr(module, op), OUT, BASE, models, [0.5] * 5, **options)


def masks(op: str) -> Any:
    module = K["elementwise"]
    return module.write_masks(getattr(module, op), [ALIGNED] * 4, BASE, MODELS, [0.5] * 5)


def pcb(mode: str) -> Any:
    numbers = [[0.1] * 4, [0.2] * 4, [0.1] * 4, [0.2] * 4, [0.1] * 4]
    return K["pcb"].pcb_merge(OUT, BASE, MODELS, *numbers, mode, 1.0)


CALLS: dict[str, Callable[[], Any]] = {
    "axpy_n": axpy_n,
    "axpy_n of 16": lambda: axpy_n(MANY[:16]),
    "axpy_n of 17": lambda: axpy_n(MANY),
    "axpy_n of bytes": lambda: axpy_n(views(4, offset=1)),
    "axpy_grid": lambda: K["axpy"].axpy_grid(OUT, MODELS, table(4, ROWS), BASE, COLUMNS, "rows"),
    "axpy_grid of columns": lambda: K["axpy"].axpy_grid(
        OUT, MODELS, table(4, COLUMNS), BASE, COLUMNS, "columns"
    ),
    "disjoint_merge": merge,
    "disjoint_merge of 8": lambda: merge(MANY[:8]),
    "disjoint_merge of 16": lambda: merge(MANY[:16], Keep(5, 7)),
    "disjoint_merge of 17": lambda: merge(MANY),
    "disjoint_merge by factors": lambda: merge(elect="plain", factors=[1.0] * 4, divisor=3.0),
    "count_votes": lambda: merge(out=None),
    "convert": lambda: [K["convert"].convert(OUT, views(2, code)[1]) for code in BY_CODE],
    "magnitude_sample": lambda: K["selection"].magnitude_sample(BASE, MODELS[:1], 0, 64, 16, 999),
    "magnitude_histogram": lambda: histogram(2048, 20, None, 31),
    "magnitude_histogram below": lambda: histogram(1 << 16, 0, [1, 2, 3, 4], 16),
    "bracket_count": lambda: K["selection"].bracket_count(BASE, MODELS[:1], [1], [5], 100),
    "locate_equal": lambda: K["selection"].locate_equal(BASE, MODELS[0], 7, 3),
    "gram_n": lambda: K["spans"].gram_n(BASE, MODELS, 4096, NUM // 4096),
    "gram_n of 8": lambda: K["spans"].gram_n(BASE, MANY[:8], 4096, NUM // 4096),
    "gram_columns": lambda: K["spans"].gram_columns(
        BASE, MODELS, np.zeros((10, COLUMNS)), COLUMNS, ROWS
    ),
    "kept_sums": lambda: K["spans"].kept_sums(BASE, MODELS, KEEPS, 0, None, 4096, NUM // 4096),
    "masked_sums": lambda: K["spans"].masked_sums(BASE, [ALIGNED] * 3, 4096, NUM // 4096),
    "row_sparsify": lambda: sparsify(COLUMNS),
    "row_sparsify of 16": lambda: sparsify(16),
    "row_sparsify of 1": lambda: sparsify(1),
    "row_divergence": lambda: K["rows"].row_divergence(BASE, MODELS[0], COLUMNS, ROWS),
    "row_scores": lambda: K["rows"].row_scores(OUT, BASE, MODELS[0], table(ROWS), COLUMNS, None),
    "select_by_score": lambda: K["rows"].row_scores(
        OUT, BASE, MODELS[0], table(ROWS), COLUMNS, 0.5
    ),
    "lora_add": lambda: K["rows"].lora_add(
        OUT, BASE, table(ROWS, 16), table(16, COLUMNS), 0, columns=COLUMNS, scale=1.0, factors=None
    ),
    "nearswap": lambda: mapped("NEARSWAP", MODELS[:1]),
    "variance_score": lambda: mapped("VARIANCE"),
    "overlap_merge": lambda: mapped("OVERLAP"),
    "overlap_counts": lambda: K["elementwise"].overlap_counts(BASE, MODELS, 0.5),
    "magmax_merge": lambda: mapped("MAGMAX"),
    "consensus_merge": lambda: mapped("CONSENSUS", minimum=2),
    "elect_max": lambda: mapped("ELECT_MAX"),
    "apply_task": lambda: mapped("APPLY_TASK", MODELS[:1], mask=ALIGNED),
    "tall_masks": lambda: masks("TALL"),
    "elect_masks": lambda: masks("ELECT"),
    "pcb_merge": lambda: pcb("raw"),
    "adam_step": lambda: K["adam"].adam_step(*views(4, F32.code), [0.1, 0.999, 0.001, 1e-5, 1e-8]),
    "weighted_mean": lambda: K["weighted_mean"].weighted_mean(
        OUT, MODELS, views(4, F32.code), [0.5] * 4, [1e-6] * 4, True
    ),
    "pcb_merge by pairs": lambda: pcb("pairwise"),
}
#: Compiled for both architectures by `make test`, for none, and the others for the newer one.
QUICK = ("axpy_n", "disjoint_merge")
LONG = ("disjoint_merge of 16", "disjoint_merge of 17", "gram_n of 8", "pcb_merge by pairs")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles anew, and leaves nothing in the cache of the user."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        NoRoom.found = 1
        yield


@functools.cache
def kernels(name: str, capability: int) -> list[tuple[str, Compiled]]:
    """The kernels that a call launches, each once."""
    found: dict[str, tuple[str, Compiled]] = {}
    for launch in launches_of(CALLS[name]):
        kind = repr((launch.kernel, sorted(launch.constants.items(), key=str)))
        if kind not in found:
            found[kind] = (launch.kernel.__name__, compiled(launch, capability))
    return list(found.values())


def both(names: Any) -> list[Any]:
    """Each name for every architecture, those marked that `make test` leaves out."""

    def is_slow(name: str, capability: int) -> bool:
        return name in LONG or (name not in QUICK and capability == ARCHITECTURES[0])

    return [
        pytest.param(
            name,
            capability,
            id=f"{name}-sm_{capability}",
            marks=[pytest.mark.slow] if is_slow(name, capability) else [],
        )
        for name in names
        for capability in ARCHITECTURES
    ]


@pytest.mark.parametrize(("name", "capability"), both(CALLS))
def test_kernels_compile_without_spills_or_contraction(name: str, capability: int) -> None:
    for kernel, code in kernels(name, capability):
        what = f"{kernel}: {code.registers} registers, {code.shared_bytes} bytes shared"
        assert code.stack_bytes == 0, f"{what}, {code.stack_bytes} bytes of stack"
        assert code.shared_bytes <= MOST_SHARED_BYTES, what
        assert not re.search(r"fma\.rn\.f32|\.ftz|div\.full|div\.approx|sqrt\.approx", code.ptx), (
            what
        )
        # A division by Newton's method is 5 fused operations in place, and 12 where its operands
        # are out of the way.
        divisions = code.count(r"div\.rn\.f32")
        # A root is at most 3.
        roots = code.count(r"sqrt\.rn\.f32")
        fused = len(re.findall(r"\bFFMA\b", code.sass))
        allowed = 5 * divisions + 12 * (divisions > 0) + 3 * roots
        assert fused <= allowed, f"{what}, {fused} FFMA"


@pytest.mark.parametrize(("name", "capability"), both(["axpy_n", "disjoint_merge"]))
def test_aligned_elements_move_in_vectors(name: str, capability: int) -> None:
    """One load of 16 bytes for the base and each of four models, one store."""
    ((_, code),) = kernels(name, capability)
    assert code.count(r"ld\.global\S*\.v4\.b32") == 5
    assert code.count(r"st\.global\S*\.v4\.b32") == code.count(r"st\.global") == 1
    narrow = code.count(r"ld\.global\S*\.b(8|16)\b")
    assert narrow == 0


def test_misaligned_elements_move_one_by_one() -> None:
    """What the test of vectors would find where they are missing."""
    ((_, code),) = kernels("axpy_n of bytes", 90)
    assert code.count(r"ld\.global\S*\.v4\.b32") == 0
    assert code.count(r"ld\.global\S*\.b8") > 0


def test_contraction_would_be_found() -> None:
    """With fusion allowed the same kernel has fused operations."""
    (launch,) = launches_of(axpy_n)
    fused = compiled(launch, 90, fusion=True)
    assert re.search(r"\bFFMA\b", fused.sass)


def test_every_kernel_is_compiled() -> None:
    files = sorted(Path(K["axpy"].__file__).parent.glob("*.py"))
    files = [f for f in files if f.stem != "gram"]  # its products are fused: see test_gram.py
    declared = {name for f in files for name in re.findall(r"def (\w+_kernel)\(", f.read_text())}
    launched = {launch.kernel.__name__ for call in CALLS.values() for launch in launches_of(call)}
    assert launched == declared


def test_other_formats_move_in_vectors_too() -> None:
    out, base, model = views(3, F32.code)
    ((_, code),) = [
        (launch.kernel, compiled(launch, 90))
        for launch in launches_of(lambda: axpy_n([model], out, base))
    ]
    assert code.count(r"ld\.global\S*\.v4\.b32") == 4
    assert code.count(r"st\.global\S*\.v4\.b32") == 2
