"""Matrix methods against FusionBench's own functions: the same tensors, the same cores, one run.

    python bench/matrix.py                          all methods
    python bench/matrix.py iso_c tsv_m --rounds 5   some, more often

Eight task vectors of each matrix have a falling spectrum and an rms of 2.7e-4, as fine-tuned vision
transformers have. Each case runs in processes of its own, FusionBench's and ours in turn; only the
calls are timed, not starting and importing. The gate: our result is as near to FusionBench's own
code in float64 as BOUNDS says, or no figure of that case is written. The error of its float32 code
stands beside. Memory is what the first call raised the resident size by.

FusionBench comes from `make bench-peers` (its environment; PYMERGE_FUSIONBENCH names another).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe, machine_line
from safetensors.torch import load_file, save_file

DRIVER = ROOT / "tests" / "parity" / "drive_fusionbench.py"
OURS = ROOT / "bench" / "matrix_ours.py"
RESULTS = ROOT / "bench" / "results"
NUM_MODELS = 8
RMS = 2.7e-4
SETS = {
    "512 x 512": [(512, 512)],
    "1024 x 1024": [(1024, 1024)],
    "4 of 768 x 768": [(768, 768)] * 4,
    "3072 x 768 and 768 x 3072": [(3072, 768), (768, 3072)],
}
SQUARES = ("512 x 512", "1024 x 1024")


@dataclass(frozen=True)
class Case:
    """A method of ours beside FusionBench's. ``bound`` is the largest relative error against the
    latter in float64, None where ours computes something else on purpose. ``scaled`` leaves out a
    factor of each matrix, which theirs takes from the norm of the whole model."""

    method: str
    theirs: str
    bound: float | None
    sets: Sequence[str] = tuple(SETS)
    options: dict[str, Any] = field(default_factory=dict)
    their_options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    scaled: bool = False


CASES = {
    "iso_c": Case("iso_c", "iso_c", 1e-5),
    "iso_cts": Case("iso_cts", "iso_cts", 1e-4),
    "tsv_m": Case("tsv_m", "tsvm", 1e-4),
    "opcm": Case("opcm", "opcm", 1e-3, scaled=True),
    "wudi-adam": Case("wudi", "wudi", 1e-4, sets=SQUARES, slow=True),
    "wudi-spectral": Case(
        "wudi", "wudi", None, sets=SQUARES, options={"solver": "spectral"}, slow=True
    ),
    "doge_ta": Case("doge_ta", "doge_ta", 1e-3, sets=SQUARES[:1], slow=True),
}


def task_vectors(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    """Singular values that fall as 1/(1 + i/10) over a floor of noise, rms RMS."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    found = []
    for _ in range(NUM_MODELS):
        left = torch.randn(rows, rank, generator=generator)
        right = torch.randn(rank, columns, generator=generator)
        falling = 1 / (1 + torch.arange(rank) / 10)
        vector = (left * falling) @ right + 0.05 * torch.randn(rows, columns, generator=generator)
        found.append(vector * (RMS / vector.square().mean().sqrt()))
    return found


def write_set(shapes: Sequence[tuple[int, int]], path: Path, dtype: torch.dtype) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number, (rows, columns) in enumerate(shapes):
        name = f"l{number}.weight"
        tensors[f"base/{name}"] = torch.zeros(rows, columns, dtype=dtype)
        for task, vector in enumerate(task_vectors(rows, columns, number)):
            tensors[f"task/{task}/{name}"] = vector.to(dtype)
    save_file(tensors, path)


class Programs:
    """Runs a job in a process of its own: ours or theirs."""

    def __init__(self, work: Path, threads: int) -> None:
        self._work = work
        self._threads = threads
        self._count = 0
        place = os.environ.get("PYMERGE_FUSIONBENCH", ROOT / ".venv-fusionbench")
        self._peer = Path(place) / "bin" / "python"
        if not self._peer.exists():
            sys.exit(f"FusionBench is not installed in {place}: run `make bench-peers`")

    def run(
        self, which: str, method: str, options: dict[str, Any], tensors: Path, repeat: int = 1
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(report, merged tensors)."""
        self._count += 1
        out = self._work / str(self._count)
        job = {
            "method": method,
            "options": options,
            "tensors": str(tensors),
            "out": str(out),
            "threads": self._threads,
            "repeat": repeat,
        }
        listed = self._work / f"{self._count}.json"
        listed.write_text(json.dumps([job]))
        program = [sys.executable, OURS] if which == "ours" else [self._peer, DRIVER]
        done = subprocess.run([*program, listed], capture_output=True, text=True, check=False)
        if done.returncode or (out / "error.txt").exists():
            text = (out / "error.txt").read_text() if (out / "error.txt").exists() else done.stderr
            sys.exit(f"{which} {method}: {text[-3000:]}")
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        merged = load_file(out / "merged.safetensors")
        (out / "merged.safetensors").unlink()
        return report, merged


def error(
    found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], scaled: bool = False
) -> float:
    """The largest relative Frobenius error of a matrix, or of its best multiple."""

    def of(ours: torch.Tensor, value: torch.Tensor) -> float:
        factor = (ours * value).sum() / ours.square().sum() if scaled else 1.0
        return float((factor * ours - value).norm() / value.norm())

    return max(of(found[name].double(), value) for name, value in truth.items())


def measure(
    name: str, case: Case, set_name: str, programs: Programs, work: Path, rounds: int
) -> Any:
    """One case: the row of the table, or None where the gate stays shut."""
    single, double = work / "single.safetensors", work / "double.safetensors"
    write_set(SETS[set_name], single, torch.float32)
    write_set(SETS[set_name], double, torch.float64)
    _, truth = programs.run("theirs", case.theirs, case.their_options, double)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    errors, peaks = {}, {}
    for number in range(rounds):
        for which in ("theirs", "ours"):
            method = case.method if which == "ours" else case.theirs
            options = case.options if which == "ours" else case.their_options
            report, merged = programs.run(which, method, options, single, 1 if case.slow else 4)
            seconds[which].append(min(report["seconds"]))
            if number == 0:
                errors[which] = error(merged, truth, case.scaled)
                peaks[which] = report["peak_bytes"]
    if case.bound is not None and errors["ours"] > case.bound:
        print(f"{name}, {set_name}: no figure, the error {errors['ours']:.1e} is above the bound")
        return None
    ratios = [a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True)]
    return {
        "method": name,
        "matrices": set_name,
        "models": NUM_MODELS,
        "seconds": seconds,
        "times_faster": statistics.median(ratios),
        "ratios": ratios,
        "relative_error": errors,
        "compared": case.bound is not None,
        "peak_bytes": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Matrix methods against FusionBench's.")
    parser.add_argument("case", nargs="*", choices=[[], *CASES], help="only these")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; 1 for slow methods")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sets", nargs="*", choices=list(SETS), help="only these matrices")
    options = parser.parse_args()
    machine = machine_line()
    print(describe(machine))
    rows = []
    with tempfile.TemporaryDirectory(prefix="pymerge-matrix-") as folder:
        programs = Programs(Path(folder), options.threads)
        for name in options.case or CASES:
            case = CASES[name]
            for set_name in case.sets:
                if options.sets and set_name not in options.sets:
                    continue
                rounds = 1 if case.slow else options.rounds
                row = measure(name, case, set_name, programs, Path(folder), rounds)
                if row is None:
                    continue
                rows.append(row)
                ours, theirs = (min(row["seconds"][which]) for which in ("ours", "theirs"))
                errors, peaks = row["relative_error"], row["peak_bytes"]
                memory = ", ".join(
                    f"{which} {'-' if size is None else f'{size / 2**20:.0f} MiB'}"
                    for which, size in peaks.items()
                )
                print(
                    f"{name:14} {set_name:26} {row['times_faster']:6.1f} times faster "
                    f"({theirs:.3f} s, {ours:.3f} s), error {errors['ours']:.1e} "
                    f"(theirs {errors['theirs']:.1e}), memory {memory}",
                    flush=True,
                )
    if not rows:
        sys.exit("no figures")
    RESULTS.mkdir(exist_ok=True)
    stamp = machine["date"].replace(":", "").replace("-", "")[:15]
    path = RESULTS / f"{'-'.join(['matrix', *options.case])}-{stamp}.json"
    document = {"machine": machine, "threads": options.threads, "cases": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
