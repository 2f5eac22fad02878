"""Checks of the Gram kernels in Triton's interpreter, against float64 numpy.

A program of its own: TRITON_INTERPRET must be set before kernels are imported, and is for this
process alone. Prints one JSON line for each check; names of checks may be given.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch

from pymerge.errors import BackendError
from pymerge.kernels import gram
from pymerge.kernels.gram import gram_acc, parts_of, tile_order

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def truth(x: torch.Tensor, base: torch.Tensor | None, side: str) -> tuple[Any, Any]:
    """The Gram matrix and that of magnitudes, both float64; differences are float32."""
    delta = x.float().numpy()
    if base is not None:
        delta = delta - base.float().numpy()
    delta = delta.astype(np.float64)
    if side == "rows":
        delta = delta.T
    return delta.T @ delta, np.abs(delta).T @ np.abs(delta)


def added(x: torch.Tensor, side: str, base: torch.Tensor | None = None) -> Any:
    """What gram_acc adds to a symmetric total, which lies between guards."""
    size = x.shape[1 if side == "columns" else 0]
    memory = torch.full((size + 2, size), 77.0, dtype=torch.float64)
    total = memory[1:-1]
    total[:] = torch.arange(size)[:, None] + torch.arange(size)[None, :]
    before = total.clone()
    gram_acc(total, x, side, base)
    assert (memory[[0, -1]] == 77).all(), "written outside"
    assert torch.equal(total.nan_to_num(1.0), total.T.nan_to_num(1.0)), "not symmetric"
    return (total - before).numpy()


def close(x: torch.Tensor, side: str, base: torch.Tensor | None = None) -> None:
    """Within twice the usual error of float32 sums of a chunk, √n units in the last place of the
    sum of magnitudes. Products of tf32 or deltas of bfloat16 are some hundred times beyond."""
    found = added(x, side, base)
    expected, sizes = truth(x, base, side)
    terms = min(x.shape[0 if side == "columns" else 1], gram.CHUNK)
    bound = 2.0**-23 * terms**0.5 * sizes + 2.0**-45 * len(sizes)
    worst = np.max(np.abs(found - expected) / bound)
    assert worst <= 1, f"{list(x.shape)} {side}: {worst} times the bound"


@check
def formats_mix_and_sizes_are_odd() -> None:
    for side, rows, columns in (("columns", 71, 33), ("rows", 33, 71)):
        x = matrix(rows, columns, torch.float16, 1)
        base = matrix(rows, columns, torch.bfloat16, 2)
        close(x, side, base)
        close(base, side)
        close(x.float(), side, base)
        close(base, side, x.float())


@check
def several_tiles() -> None:
    close(matrix(40, 130, torch.bfloat16, 3), "columns", matrix(40, 130, torch.bfloat16, 4))
    close(matrix(96, 48, torch.bfloat16, 5), "rows")
    close(matrix(1, 65, torch.float32, 6), "columns")
    close(matrix(1, 1, torch.float32, 7), "rows")


@check
def chunks_are_added_in_order_whatever_the_parts() -> None:
    x = matrix(2 * gram.CHUNK + 37, 20, torch.float32, 8)
    assert parts_of(3, 1) == (1, 3)
    close(x, "columns")
    several = added(x, "columns")
    before, gram.FILL = gram.FILL, 1
    try:
        assert parts_of(3, 1) == (3, 1)
        one = added(x, "columns")
        close(x.T.contiguous(), "rows")
    finally:
        gram.FILL = before
    assert one.tobytes() == several.tobytes()
    # Two chunks in the first part, one in the second.
    gram.FILL = 2
    try:
        assert parts_of(3, 1) == (2, 2)
        close(x, "columns")
    finally:
        gram.FILL = before


@check
def small_integers_are_exact() -> None:
    generator = torch.Generator().manual_seed(9)
    x, base = (
        torch.randint(-8, 8, (100, 70), generator=generator).to(dtype)
        for dtype in (torch.bfloat16, torch.float16)
    )
    for side in ("columns", "rows"):
        expected, _ = truth(x, base, side)
        assert (added(x, side, base) == expected).all()


@check
def rows_may_lie_apart() -> None:
    wide = matrix(50, 80, torch.float32, 10)
    tall = matrix(80, 50, torch.bfloat16, 11)
    base = tall.T[:, 16:64]
    for side in ("columns", "rows"):
        close(wide[:, 16:64], side, wide[:, 32:80].to(torch.bfloat16))
        close(wide[:, 16:64], side, base)
        close(wide[3:, 7:28], side)
        close(wide[:1].expand(50, 80), side)


@check
def not_a_number_stays_where_it_is() -> None:
    x = matrix(40, 70, torch.bfloat16, 12)
    x[5, 3] = float("nan")
    x[6, 66] = float("inf")
    for side, places in (("columns", [3, 66]), ("rows", [5, 6])):
        finite = np.isfinite(added(x, side))
        expected = np.ones_like(finite)
        expected[places] = expected[:, places] = False
        assert (finite == expected).all()


@check
def nothing_to_add_changes_nothing() -> None:
    total = torch.ones(5, 5, dtype=torch.float64)
    gram_acc(total, torch.empty(0, 5), "columns")
    gram_acc(torch.empty(0, 0, dtype=torch.float64), torch.empty(0, 5), "rows")
    assert (total == 1).all()


@check
def operands_that_do_not_fit_are_refused() -> None:
    x, total = torch.ones(4, 6), torch.zeros(6, 6, dtype=torch.float64)
    for words, arguments in {
        "float64 total of [4, 4]": (total, x, "rows"),
        "found torch.float32 [6, 6]": (total.float(), x),
        "side columns or rows": (total, x, "diagonal"),
        "contiguous total": (torch.zeros(6, 12, dtype=torch.float64)[:, ::2], x),
        "x to be a matrix": (total, x.double()),
        "found torch.float32 [24]": (total, x.flatten()),
        "base to be [4, 6]": (total, x, "columns", x.T),
        "x and total on one cpu device, found meta": (total, x.to("meta")),
    }.items():
        with pytest.raises(BackendError, match=re.escape(words)):
            gram_acc(*arguments)
    assert (total == 0).all()


@check
def tiles_are_each_taken_once() -> None:
    for num in (1, 2, gram.GROUP, gram.GROUP + 1, 37):
        pairs = tile_order(num)
        assert pairs.shape == (num * (num + 1) // 2, 2)
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
        assert (pairs[:, 0] >= pairs[:, 1]).all()
        assert pairs.max() == num - 1


def main(names: list[str]) -> int:
    for name in names or CHECKS:
        problem = None
        try:
            CHECKS[name]()
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps({"check": name, "problem": problem}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
