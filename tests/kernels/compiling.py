"""Compiles what the launchers would launch on a GPU, on a machine without one.

The launchers of pymerge/kernels run with views of memory that nobody touches; a recorder stands
where they launch. So kernels are compiled with exactly the arguments and constants that they get.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymerge.formats import BF16, BY_CODE
from pymerge.ops.view import View

FAMILIES = (
    *("adam", "axpy", "convert", "elementwise", "gram", "merge", "pcb", "rows", "selection"),
    *("spans", "weighted_mean"),
)
ALIGNED = 0x7F00_0000_0000
NUM = 1 << 20


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Compiled(NamedTuple):
    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


def views(count: int, code: int | None = BF16.code, num: int = NUM, offset: int = 0) -> list[View]:
    """Elements at made-up addresses, ``offset`` bytes beyond a multiple of 16."""
    assert code is not None
    stride = 16 * (num * BY_CODE[code].num_bytes // 16 + 4)
    return [View(ALIGNED + (i + 1) * stride + offset, code, num) for i in range(count)]


class NoRoom:
    """Stands for a Room: scratch that only has an address; results are zeros, or ``found``."""

    found = 0

    def __init__(self, address: int) -> None:
        pass

    def __enter__(self) -> NoRoom:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def zeros(self, shape: Any, dtype: str) -> Any:
        scratch = importlib.import_module("pymerge.kernels.launch").Scratch

        class Result(scratch):
            def numpy(self) -> Any:
                return np.full(shape, NoRoom.found, dtype)

        return Result(ALIGNED, None)

    def upload(self, array: Any) -> Any:
        return self.zeros(array.shape, array.dtype.name)

    copy = upload


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched meanwhile."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: Any, *arguments: Any, num_warps: int = 8, **constants: Any):
        assert all(0 < side < 2**31 for side in grid)
        launches.append(Launch(kernel, arguments, {**constants, "num_warps": num_warps}))

    modules = [importlib.import_module(f"pymerge.kernels.{name}") for name in FAMILIES]
    before = [(module, module.Room, module.launch) for module in modules]
    for module in modules:
        module.Room, module.launch = NoRoom, record
    try:
        yield launches
    finally:
        for module, room, launch in before:
            module.Room, module.launch = room, launch


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    with recorded() as launches:
        call()
    assert launches
    return launches


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type_of(v) for v in value)
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(launch: Launch, capability: int, *, fusion: bool = False) -> Compiled:
    kernel, arguments, constants = launch
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": fusion}
    if "num_stages" in constants:
        options["num_stages"] = constants.pop("num_stages")
    names = kernel.arg_names
    signature: dict[str, Any] = dict(zip(names, map(_type_of, arguments), strict=False))
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(arguments):
        # What Triton does of its own: 1 becomes a constant, multiples of 16 are marked.
        if names[i] in kernel.do_not_specialize or not isinstance(argument, int):
            continue
        if argument == 1:
            signature[names[i]], values[(i,)] = "constexpr", 1
        elif argument % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], values[(names.index(name),)] = "constexpr", value
    assert list(signature) == list(names), (list(signature), names)
    source = ASTSource(kernel, signature, values, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = Path(result.metadata_group[f"{result.metadata.name}.cubin"])
    usage = _cuobjdump("-res-usage", cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    sass = _cuobjdump("-sass", cubin)
    return Compiled(result.asm["ptx"], sass, registers, stack, result.metadata.shared)


def _cuobjdump(option: str, cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([program, option, cubin], capture_output=True, text=True, check=True)
    return done.stdout
