"""The one table of cases: every op on every tile, for whichever backend is to be compared.

As a program it compares a backend with the reference, without pytest, and prints a line of JSON for
each op: {"op", "cases", "failures"}. ``--small`` leaves out what an emulator is too slow for:

    python tests/ops/cases.py cuda [--small] [op ...]
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import traceback
from typing import Any, NamedTuple

from cases_maps import MAP_RUNS
from cases_rows import LORA_RUNS, ROW_RUNS
from cases_selection import SELECTION_RUNS, Run
from tiles import LORA_TILES, ROW_TILES, SMALL, TILES, Memory, Tile, check_same

from pymerge.ops import reference


class Case(NamedTuple):
    """An op on a tile."""

    op: str
    tile: Tile

    def __str__(self) -> str:
        return f"{self.op}-{self.tile}"

    @property
    def small(self) -> bool:
        return self.tile.small


RUNS: dict[str, Run] = {**SELECTION_RUNS, **ROW_RUNS, **LORA_RUNS, **MAP_RUNS}


def tiles_of(op: str) -> list[Tile]:
    return ROW_TILES if op in ROW_RUNS else LORA_TILES if op in LORA_RUNS else TILES


CASES = [Case(op, tile) for op in RUNS for tile in tiles_of(op)]


@functools.lru_cache(maxsize=8)
def expected_of(case: Case) -> dict[str, Any]:
    return dict(RUNS[case.op](reference, Memory(case.tile)))


def compare(case: Case, backend: Any, device: Any = None) -> None:
    """Raises AssertionError at the first result of the backend that is not the reference's.

    ``device``: the pymerge.ops.device.Device in whose memory the backend works, None for the host.
    """
    memory = Memory(case.tile, device)
    expected = expected_of(case)
    found = dict(RUNS[case.op](backend, memory))
    if found.keys() != expected.keys():
        raise AssertionError(f"{case}: results {sorted(found)}, expected {sorted(expected)}")
    for name, value in found.items():
        check_same(value, expected[name], f"{case}, {name}")
    memory.check_untouched()


def main(arguments: list[str]) -> int:
    small = "--small" in arguments
    name, *chosen = [word for word in arguments if not word.startswith("--")]
    backend = importlib.import_module(f"pymerge.ops.{name}")
    device = None
    if name in ("cuda", "triton"):
        device = importlib.import_module("pymerge.ops.device").devices_for(name)[0]
    failed = False
    for op in chosen or RUNS:
        cases = [case for case in CASES if case.op == op and (case.small or not small)]
        print(f"{op}: {len(cases)} cases", file=sys.stderr, flush=True)
        failures = []
        for case in cases:
            try:
                compare(case, backend, device)
            except AssertionError as error:
                failures.append(str(error))
            except Exception:
                failures.append(f"{case}: {traceback.format_exc(limit=-3)}")
        failed |= bool(failures)
        line = {"op": op, "cases": len(cases), "failures": failures}
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    if not all(case.tile.num <= SMALL for case in CASES if case.small):
        raise SystemExit(f"a case for emulators has more than {SMALL} elements")
    sys.exit(main(sys.argv[1:]))
