"""The Gram kernels: in Triton's interpreter (interpreted_gram.py), and compiled without a GPU."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted", allow_module_level=True)

from compiling import ALIGNED, Compiled, compiled, launches_of

from pymerge.errors import BackendError
from pymerge.formats import BF16, F16, F32

gram: Any = importlib.import_module("pymerge.kernels.gram")
PROGRAM = Path(__file__).with_name("interpreted_gram.py")
#: Shared memory that a block can have on every device of compute capability 8 and 9.
MOST_SHARED_BYTES = 99 * 1024


def names() -> list[str]:
    functions = [n for n in ast.parse(PROGRAM.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d) == "check" for d in f.decorator_list)]


@functools.cache
def reports() -> tuple[dict[str, Any], str]:
    """What one process for all checks says of each, and how it ended."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYMERGE_", "TRITON_"))},
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["check"]: report["problem"] for report in found}, done.stderr[-2000:]


@pytest.mark.parametrize("name", names())
def test_interpreted_gram_matrices_are_those_of_float64(name: str) -> None:
    found, end = reports()
    assert name in found, end
    assert found[name] is None, found[name]


def test_there_are_checks() -> None:
    assert len(names()) >= 8


def test_without_a_gpu_it_says_why_and_refuses_host_memory() -> None:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "sees no GPU" in gram.why_not()
    total = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(BackendError, match="on one cuda device, found cpu"):
        gram.gram_acc(total, torch.ones(3, 2))
    assert not total.any()


@pytest.mark.slow
def test_the_op_of_matrices_takes_the_kernel_that_it_is_asked_for() -> None:
    """The GPU check of the op, on the CPU: each backend against float64, and marked as such."""
    program = Path(__file__).parents[2] / "bench/matrix_gpu.py"
    cases = "gram_acc torch,gram_acc triton"
    done = subprocess.run(
        [sys.executable, str(program), "--emulate", "--cases", cases],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYMERGE_", "TRITON_"))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert {record["case"] for record in records} == {"gemm", *cases.split(",")}
    for record in records:
        assert record["ok"]
        assert record["emulated"]
        assert not {"seconds", "gflops", "gflops_of", "share_of_gemm"} & set(record)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles anew, and leaves nothing in the cache of the user."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


FORMATS = {"bf16": BF16, "fp16": F16, "fp32": F32}


def launches(size: int, side: int, x: str, base: str | None, ld: int = 0) -> list[Any]:
    """What a Gram matrix of ``size`` columns (side 0) or rows (side 1) and 4096 terms launches."""

    def operand(code: int | None, number: int) -> Any:
        period = ld or (size if side == 0 else 4096)
        piece = gram.Piece(ALIGNED + (number << 32), code, period)
        return gram.Operand(piece, period, None)

    start = None if base is None else operand(FORMATS[base].code, 2)
    terms = 4096 if not ld or side == 0 else ld
    return launches_of(
        lambda: gram._launch(
            ALIGNED,
            operand(FORMATS[x].code, 1),
            start,
            side,
            terms,
            ld if ld and not side else size,
        )
    )


def tiles_and_mirror(capability: int, monkeypatch: pytest.MonkeyPatch, *how: Any) -> list[Compiled]:
    monkeypatch.setattr(gram, "_capability", lambda: capability)
    found = launches(*how)
    assert [launch.kernel.__name__ for launch in found] == [
        "gram_tiles_kernel",
        "gram_mirror_kernel",
    ]
    return [compiled(launch, capability) for launch in found]


def cases() -> list[Any]:
    """Every tile of the table with the formats that need most shared memory and most registers;
    `make test` takes the largest tile once for each architecture."""
    found = []
    for capability, rows in gram.TILES.items():
        for least, tile in rows.items():
            for side in (0, 1):
                for x, base in (("bf16", "bf16"), ("fp32", "fp32"), ("fp16", None)):
                    quick = tile.side == 128 and (side, x) == (
                        (0, "fp32") if capability == 80 else (1, "bf16")
                    )
                    found.append(
                        pytest.param(
                            *(capability, least, side, x, base),
                            id=f"sm_{capability}-{tile.side}-{gram._SIDES[side]}-{x}-{base}",
                            marks=[] if quick else [pytest.mark.slow],
                        )
                    )
    return found


#: Accumulators that do not fit would be kilobytes; of one tile Triton 3.9 leaves two registers on
#: the stack, 3.6 none.
MOST_STACK_BYTES = 0 if version("triton").startswith("3.6.") else 8


@pytest.mark.parametrize(("capability", "least", "side", "x", "base"), cases())
def test_tiles_compile_to_float32_products_and_vector_loads(
    capability: int,
    least: int,
    side: int,
    x: str,
    base: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = gram.TILES[capability][least]
    size = max(least, 256)
    code, mirror = tiles_and_mirror(capability, monkeypatch, size, side, x, base)
    what = f"{code.registers} registers, {code.shared_bytes} bytes shared"
    for each in (code, mirror):
        assert each.stack_bytes <= MOST_STACK_BYTES, f"{what}, {each.stack_bytes} bytes of stack"
        assert each.shared_bytes <= MOST_SHARED_BYTES, what
    # Each product of a tile once, in float32: no tensor core, no tf32, none outside the tile.
    products = tile.side**2 * tile.depth // (32 * tile.num_warps)
    assert code.count(r"fma\.rn\.f32") == products
    assert not re.search(r"mma|tf32|\.ftz|bf16x2|mul\.rn\.bf16|f16x2", code.ptx)
    assert code.count(r"cvt\.f64\.f32") == tile.side**2 // (32 * tile.num_warps)
    # Panels come in vectors of 16 bytes, read ahead; nothing of them element by element.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (\w+)", code.ptx)
    assert copies
    assert {int(size, 16) for size in copies} == {16}
    assert code.count(r"ld\.global\S*\.b(8|16)\b") == 0
    assert mirror.count(r"fma") == 0


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_end_within_a_vector_are_read_one_by_one(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test of vectors would find where they are missing."""
    code, _ = tiles_and_mirror(90, monkeypatch, 4096, side, "bf16", None, 4095)
    assert code.stack_bytes == 0
    assert "cp.async.cg" not in code.ptx
    assert code.count(r"ld\.global\S*\.b16\b") > 0


def test_the_tile_is_the_device_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in ((80, 80), (86, 80), (89, 80), (90, 90), (100, 90)):
        monkeypatch.setattr(gram, "_capability", lambda found=capability: found)
        for size, least in ((1, 0), (511, 0), (512, 512), (2047, 512), (2048, 2048), (28672, 2048)):
            assert gram.tile_of(size) == gram.TILES[expected][least]
    for rows in gram.TILES.values():
        for tile in rows.values():
            assert gram.DEPTH % tile.depth == gram.CHUNK % gram.DEPTH == 0
