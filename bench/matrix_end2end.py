"""Whole merges by matrix methods, from files to files: what they take beside what the plan says.

    python bench/matrix_end2end.py --gb 1 --models 4 --memory 2GiB        wudi, tsv_m and iso_c

The set is Llama-shaped in bfloat16, a base and --models fine-tuned models of --gb each (models.py).
For each method `pymerge plan` predicts the time of the matrices at this machine's rates, then
`pymerge merge` runs with a trace in a process of its own whose peak memory is taken from the
kernel; the output is verified. A method is said as a recipe says it, with parameters where needed:
wudi:solver=spectral.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from end2end import run
from machine import ROOT, describe, machine_line
from models import shape_of_size

RESULTS = ROOT / "bench" / "results"
COMMAND = Path(sys.executable).with_name("pymerge")
METHODS = ("iso_c", "tsv_m", "wudi:solver=spectral")


def write_recipe(text: str, work: Path, num_models: int) -> Path:
    method, _, parameters = text.partition(":")
    lines = [f"merge_method: {method}", f"base_model: {work / 'base'}", "models:"]
    lines += [f"  - {{model: {work / f'tuned-{i + 1}'}}}" for i in range(num_models)]
    if parameters:
        pairs = ", ".join(part.replace("=", ": ") for part in parameters.split(","))
        lines.append(f"parameters: {{{pairs}}}")
    lines.append("dtype: bfloat16")
    path = work / f"{text.replace(':', '-').replace('=', '-')}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(text: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    recipe, out, trace = write_recipe(text, work, options.models), work / "out", work / "trace.json"
    shutil.rmtree(out, ignore_errors=True)
    words = ["--memory", options.memory]
    planned = subprocess.run(
        [COMMAND, "plan", recipe, *words, "--json", "--folder", work],
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(planned.stdout)
    usage = run([COMMAND, "merge", recipe, out, *words, "--trace", trace])
    subprocess.run([COMMAND, "verify", out], check=True, capture_output=True)
    events = json.loads(trace.read_text())
    solved = sum(e.get("dur", 0) for e in events["traceEvents"] if e.get("cat") == "solve")
    row = {
        "method": text,
        "seconds": usage.wall,
        "cpu_seconds": usage.cpu,
        "peak_mib": usage.peak_mib,
        "predicted_matrix_seconds": plan["matrices"]["seconds"],
        "matrices": plan["matrices"],
        "floor_seconds": plan["floor_seconds"],
        "solve_thread_seconds": solved / 1e6,
        "bytes_read": plan["bytes_read"],
        "bytes_written": plan["bytes_written"],
    }
    print(
        f"{text:24} {usage.wall:8.1f} s, {plan['matrices']['seconds']:.1f} s predicted for the "
        f"matrices; peak {usage.peak_mib:.0f} MiB of {options.memory}; verified",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole merges by matrix methods.")
    parser.add_argument("method", nargs="*", default=METHODS)
    parser.add_argument("--gb", type=float, default=1.0, help="size of each model")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--dir", type=Path, default=ROOT / "bench" / "work" / "matrix")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    options = parser.parse_args()
    machine = machine_line()
    print(describe(machine))
    work = options.dir
    if not (work / f"tuned-{options.models}").exists():
        command = [sys.executable, ROOT / "bench" / "models.py", work, "--gb", str(options.gb)]
        subprocess.run([*command, "--models", str(options.models)], check=True)
    rows = [measure(text, work, options) for text in options.method]
    shape = shape_of_size(options.gb)
    document = {
        "machine": machine,
        "models": options.models,
        "gb_each": shape.num_elements * 2 / 1e9,
        "shape": shape.__dict__,
        "memory": options.memory,
        "merges": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    stamp = machine["date"].replace(":", "").replace("-", "")[:15]
    path = RESULTS / f"matrix-end2end-{options.gb:g}gb-{stamp}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")
    if not options.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
