"""Kernel benchmarks: `make bench`, or `make bench OP=axpy_n` for one op; `ops` means all.

Gate first: the ops' tests run, and on a red one no figure is printed. Each module named in `SUITES`
has ``run(names) -> list[dict]``, which times the named ops (all where there are none) on buffers
that take turns, and returns for each case the keys of `COLUMNS`: medians of the thread's CPU time
and of wall time, the rate of the bytes that the op must move, and its share of the bandwidth that a
plain copy reaches on the same core in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from typing import Any

from machine import ROOT, describe, machine_line

#: Benchmark module -> the tests that must be green before it runs.
SUITES = {"ops_cpu": "tests/ops"}
COLUMNS = {
    "op": ("op", "{}"),
    "isa": ("isa", "{}"),
    "num_models": ("models", "{}"),
    "ns_per_element_and_model": ("ns/element/model", "{:.3f}"),
    "wall_ns_per_element_and_model": ("wall ns", "{:.3f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "share_of_copy": ("of copy", "{:.0%}"),
}
RESULTS = ROOT / "bench" / "results"


def gate(tests: str) -> None:
    """Run ``tests``; leave with their output where one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", str(ROOT / tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nno figures: {tests} is not green")


def print_table(cases: list[dict[str, Any]]) -> None:
    rows = [[title for title, _ in COLUMNS.values()]]
    rows += [[form.format(case[key]) for key, (_, form) in COLUMNS.items()] for case in cases]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*left, *right]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("op", nargs="*", help="only these ops")
    names = [name for name in parser.parse_args().op if name != "ops"]
    machine = machine_line()
    cases: list[dict[str, Any]] = []
    for suite, tests in SUITES.items():
        gate(tests)
        cases += importlib.import_module(suite).run(names)
    if not cases:
        sys.exit(f"no benchmark of an op named {' or '.join(names)}")
    print(describe(machine))
    print(f"copy on one core: {cases[0]['copy_gb_per_s']:.1f} GB/s (read + written)")
    print_table(cases)
    stamp = machine["date"].replace(":", "").replace("-", "")[:15]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{'-'.join(['ops', *names])}-{stamp}.json"
    path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
