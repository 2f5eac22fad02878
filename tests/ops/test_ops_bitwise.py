"""Every op on every backend of this machine against the reference, bit by bit, over one table of
cases (cases.py)."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, RUNS, Case, compare
from cases_selection import keeps_of, weights_of
from tiles import LORA_TILES, ROW_LENGTHS, ROW_TILES, SIZES, SMALL, TILES, Guarded, Memory, Tile

from pymerge.ops import OPS, arguments, cpu, dispatch, reference
from pymerge.ops.view import View

ISAS = ("scalar", "avx2", "avx512")

#: As shown -> the backend's name, what its environment needs, and whether it is an emulator.
ELSEWHERE: dict[str, tuple[str, dict[str, str], bool]] = {
    "triton-interpreter": ("triton", {"TRITON_INTERPRET": "1"}, True),
    "cuda-emulated": ("cuda", {"PYMERGE_CUDA_EMULATE": "1"}, True),
    "triton": ("triton", {}, False),
    "cuda": ("cuda", {}, False),
}

WHY_NOT = """
import importlib, sys
print(importlib.import_module(f"pymerge.ops.{sys.argv[1]}").why_not(sys.argv[2]) or "")
"""


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("case", [c for c in CASES if hasattr(cpu, c.op)], ids=str)
def test_cpu_gives_the_bytes_of_the_reference(case: Case, name: str) -> None:
    if name not in cpu.available_isas():
        pytest.skip(f"this machine and build lack the instruction set {name}")
    before = cpu.isa()
    cpu.use_isa(name)
    try:
        compare(case, cpu)
    finally:
        cpu.use_isa(before)


def environment_of(shown: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYMERGE_", "TRITON_"))}
    return {**clean, **ELSEWHERE[shown][1]}


@functools.cache
def why_not(shown: str, op: str) -> str:
    """What keeps a backend of another process from running, or nothing."""
    done = subprocess.run(
        [sys.executable, "-c", WHY_NOT, ELSEWHERE[shown][0], op],
        env=environment_of(shown),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@functools.cache
def compared_elsewhere(shown: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What cases.py reports of each op, by one process for all, and how that process ended."""
    backend, _, emulated = ELSEWHERE[shown]
    command = [sys.executable, str(Path(__file__).with_name("cases.py")), backend]
    done = subprocess.run(
        # Triton compiles each case anew, which for the whole table takes hours on a device too.
        [*command, *(["--small"] if emulated or backend == "triton" else [])],
        env=environment_of(shown),
        capture_output=True,
        text=True,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    end = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    return {report["op"]: report for report in reports}, end


#: The interpreter takes minutes for the table; tests/kernels covers its ops in the quick tests.
SLOW = {"triton-interpreter"}


@pytest.mark.parametrize(
    "shown", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in ELSEWHERE]
)
@pytest.mark.parametrize("op", RUNS)
def test_elsewhere_gives_the_bytes_of_the_reference(op: str, shown: str) -> None:
    """Backends that look at the environment when they are loaded run in a process of their own."""
    first = why_not(shown, "axpy_n")
    if first:
        pytest.skip(f"{shown}: {first}")
    reports, end = compared_elsewhere(shown)
    assert op in reports, end
    assert reports[op]["cases"] > 0
    assert not reports[op]["failures"], "\n".join(reports[op]["failures"])


def test_every_op_has_cases() -> None:
    assert set(RUNS) == set(OPS)
    for op in OPS:
        assert any(case.small for case in CASES if case.op == op)


def test_every_backend_offers_what_the_table_says() -> None:
    for backend in dispatch.BACKENDS:
        module = dispatch.backend_module(backend)
        if module.why_not("axpy_n") is None:
            for op in OPS.values():
                assert callable(getattr(module, op.name, None)), f"{backend} has no {op.name}"


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_those_of_the_table(op: str) -> None:
    parameters: list[str] = []
    for name, parameter in inspect.signature(getattr(reference, op)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        has_default = parameter.default is not parameter.empty
        parameters.append(f"{name}={parameter.default!r}" if has_default else name)
    assert OPS[op].signature.partition(" -> ")[0] == f"{op}({', '.join(parameters)})"

    def shape(function: Any) -> list[tuple[Any, ...]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    assert shape(getattr(arguments, op)) == shape(getattr(reference, op))
    for backend in ("cpu", "triton", "cuda"):
        function = getattr(dispatch.backend_module(backend), op, None)
        if function is not None:
            assert shape(function) == shape(getattr(reference, op)), backend


def test_the_cases_cover_what_they_should() -> None:
    assert {tile.num for tile in TILES} >= set(SIZES)
    assert {tile.num for tile in LORA_TILES} >= set(SIZES)
    assert {tile.columns for tile in ROW_TILES} >= set(ROW_LENGTHS)
    for tiles in (TILES, ROW_TILES, LORA_TILES):
        assert len({str(tile) for tile in tiles}) == len(tiles)
        assert {f for t in tiles for f in t.models} == {f for t in tiles for f in (t.base,)}
        assert any(t.start > 2**31 and t.start % 4 for t in tiles)
        assert all(t.num <= SMALL for t in tiles if t.small)
        # Small tiles take a third of the calls each, by their number: all thirds must be taken.
        assert {t.number % 3 for t in tiles if t.small and t.num} == {0, 1, 2}
        assert {t.content for t in tiles} >= {"normal", "special"}
    assert {len(tile.models) for tile in TILES} >= {1, 2, 3, 4, 16, 17, 40}
    assert all(tile.num % tile.columns == 0 for tile in ROW_TILES)


def test_a_wrong_result_is_found() -> None:
    """A backend that differs in one bit, drops a result or writes past its end does not pass."""
    case = next(case for case in CASES if case.op == "elect_max" and case.tile.num == 65)

    class Wrong:
        def __init__(self, change: Any) -> None:
            self.change = change

        def elect_max(self, out: View, base: View, models: list[View]) -> int:
            count = reference.elect_max(out, base, models)
            memory = reference.elements.memory_of(View(out.ptr, out.code, out.num + 8))
            return self.change(memory, count)

    def flip(memory: Any, count: int) -> int:
        memory[7] ^= 1
        return count

    def overrun(memory: Any, count: int) -> int:
        memory[65 * 2] ^= 0xFF
        return count

    compare(case, Wrong(lambda memory, count: count))
    with pytest.raises(AssertionError, match="out: 1 bytes differ, first byte 7"):
        compare(case, Wrong(flip))
    with pytest.raises(AssertionError, match="guard region: 1 bytes differ"):
        compare(case, Wrong(overrun))
    with pytest.raises(AssertionError, match="count: "):
        compare(case, Wrong(lambda memory, count: count + 1))


def part(v: View, begin: int, end: int) -> View:
    return v.part(begin, end - begin)


TILED = ("axpy_n", "convert", "disjoint_merge", "kept_sums", "gram_n", "masked_sums")


@pytest.mark.parametrize("op", TILED)
def test_result_does_not_depend_on_the_tile(op: str, isa: str, same_bytes: Any) -> None:
    """A tensor cut at odd places gives the bytes of the whole, with indices that continue; sums
    one cut at multiples of their span."""
    tile = Tile(4097, content="ties", start=2**33 + 1)
    memory = Memory(tile)
    weights, keeps = weights_of(tile), keeps_of(tile)["all at once"]
    masks = [mask.view.ptr for mask in memory.bits(2)]
    span = 64

    def apply(begin: int, end: int, out: Guarded) -> Any:
        models = [part(v, begin, end) for v in memory.views]
        base, to = part(memory.base.view, begin, end), part(out.view, begin, end)
        start = tile.start + begin
        if op == "axpy_n":
            return cpu.axpy_n(to, models, weights, base=base)
        if op == "convert":
            return cpu.convert(to, models[0])
        if op == "disjoint_merge":
            return cpu.disjoint_merge(to, base, models, weights, keeps, start)
        if op == "kept_sums":
            return cpu.kept_sums(base, models, keeps, start, span=span)
        if op == "gram_n":
            return cpu.gram_n(base, models, span=span)
        return cpu.masked_sums(models[0], [at + begin // 8 for at in masks], span=span)

    sums = op in ("kept_sums", "gram_n", "masked_sums")
    inner = [64, 640, 704, 2048, 3968] if sums else [1, 130, 131, 1499, 1502, 2222, 3000]
    whole, pieces = memory.output(), memory.output()
    expected = apply(0, tile.num, whole)
    found = [apply(a, b, pieces) for a, b in itertools.pairwise([0, *inner, tile.num])]
    if sums:
        same_bytes(np.concatenate(found), expected, op)
    else:
        assert sum(found) == expected
        same_bytes(pieces.payload, whole.payload, op)


@pytest.mark.parametrize("op", ["row_sparsify", "lora_add", "gram_columns"])
def test_rows_do_not_depend_on_the_tile(op: str, isa: str, same_bytes: Any) -> None:
    tile = Tile(12 * 131, columns=131, start=131 * 10**8)
    memory = Memory(tile)
    rng = np.random.default_rng(1)
    left = rng.normal(size=(16, 3)).astype(np.float32)
    right = rng.normal(size=(3, 131)).astype(np.float32)

    def apply(begin: int, end: int, out: Guarded, sums: Any) -> None:
        models = [part(v, begin, end) for v in memory.views]
        base, to = part(memory.base.view, begin, end), part(out.view, begin, end)
        if op == "row_sparsify":
            cpu.row_sparsify(
                to, base, models[0], tile.start + begin, columns=131, draws_low=10**9,
                draws_span=2 * 10**9, seed=77, rescale=True,
            )  # fmt: skip
        elif op == "lora_add":
            cpu.lora_add(to, base, left, right, 262 + begin, columns=131, scale=0.5)
        else:
            cpu.gram_columns(base, models, sums, columns=131)

    edges = [0, 131, 4 * 131, 12 * 131]
    if op == "lora_add":
        edges = [0, 7, 131, 140, 1000, 12 * 131]
    whole, pieces = memory.output(), memory.output()
    total, added = np.zeros((10, 131)), np.zeros((10, 131))
    apply(0, tile.num, whole, total)
    for begin, end in itertools.pairwise(edges):
        apply(begin, end, pieces, added)
    if op == "gram_columns":
        assert np.any(total)
        same_bytes(added, total, op)
    else:
        same_bytes(pieces.payload, whole.payload, op)


def test_a_flipped_bit_is_reported(same_bytes: Any) -> None:
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = expected.copy()
    found[1, 1] = -4.0
    with pytest.raises(AssertionError, match=r"first byte 19 at index \(1, 1\).*0xc0800000"):
        same_bytes(found, expected, "example")


def test_tiles_are_distinct() -> None:
    assert replace(TILES[0], num=3) not in TILES


def test_triton_is_found_where_it_is_installed() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert "not installed" not in why_not("triton-interpreter", "axpy_n")
