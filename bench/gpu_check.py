"""Build, check and time the GPU backends on a machine that has a GPU: one command, one JSON.

    python bench/gpu_check.py                       # everything
    python bench/gpu_check.py --wheels wheels       # with wheels carried along for the full command
    python bench/gpu_check.py --emulate             # every step that needs no GPU, nothing is timed

Needs torch, triton, numpy, safetensors, setuptools, pybind11, cmake, ninja, nvcc and pip, no
package index. In order: (1) build pymerge with CUDA kernels in place; (2) compare every op on cuda
and triton with the reference, byte by byte (tests/ops/cases.py); (3) time every op
(bench/ops_gpu.py); (4) check and time the matrix ops and methods on layer shapes of Llama
(bench/matrix_gpu.py); (5) merge checkpoints from the page cache on the GPU and on the CPU, compare
the bytes and the seconds. A step that fails is recorded and the next ones still run, but nothing is
timed on a backend that is red. Step 5 needs what the command line needs (pydantic, typer, ...) and
says so where it is missing.

On triton step 2 takes the small cases: all of them are some 4,000 kernels to compile; ``--full``
takes them nevertheless. The JSON goes to bench/results, what there is of it after every step; with
``--emulate`` nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import ROOT, describe, machine_line

BENCH = ROOT / "bench"
BACKENDS = ("cuda", "triton")
METHODS = ("linear", "ties", "dare_ties")
EMULATORS = {"cuda": {"PYMERGE_CUDA_EMULATE": "1"}, "triton": {"TRITON_INTERPRET": "1"}}
Record = dict[str, Any]


def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """A command's end and everything it said; 124 where it took longer than ``limit`` seconds, 127
    where there is no such program. Switches of ours in the environment do not reach it."""
    words = [str(part) for part in command]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYMERGE_") and name != "TRITON_INTERPRET"
    }
    try:
        return subprocess.run(
            words,
            cwd=ROOT,
            env={**clean, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as stop:
        said = stop.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        text += f"\nended after {limit} seconds"
        return subprocess.CompletedProcess(words, 124, text)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(words, 127, str(error))


def build(wheels: Path | None) -> Record:
    """Install in place, with CUDA required; wheels first where there are some."""
    start = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet"]
    if wheels is not None:
        done = run([*pip, *sorted(wheels.glob("*.whl"))])
        if done.returncode:
            return {"ok": False, "wheels": done.stdout[-3000:]}
    options = ["--no-deps", "--no-build-isolation", "--editable", "."]
    done = run([*pip, *options], {"PYMERGE_CMAKE_ARGS": "-DPYMERGE_CUDA=ON"})
    record: Record = {"ok": done.returncode == 0, "seconds": time.perf_counter() - start}
    if done.returncode:
        record["output"] = done.stdout[-6000:]
    return record


def test(backend: str, environment: dict[str, str], small: bool, limit: float) -> Record:
    """The shared table of cases on a backend, against the reference."""
    start = time.perf_counter()
    command = [sys.executable, "tests/ops/cases.py", backend, *(["--small"] if small else [])]
    done = run(command, environment, limit)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"op"')]
    failures = [failure for report in reports for failure in report["failures"]]
    record: Record = {
        "ok": done.returncode == 0 and bool(reports) and not failures,
        "seconds": time.perf_counter() - start,
        "small": small,
        "ops": len(reports),
        "cases": sum(report["cases"] for report in reports),
        "failures": len(failures),
    }
    if not record["ok"]:
        record["output"] = "\n".join([*failures[:20], done.stdout[-3000:]])
    return record


def time_ops(backend: str, num_elements: int, environment: dict[str, str], limit: float) -> Record:
    """bench/ops_gpu.py in a process of its own, so that a crash costs one backend only."""
    where = "cpu" if environment else "cuda"
    code = (
        "import json, ops_gpu; "
        f"print(json.dumps(ops_gpu.measure({backend!r}, {num_elements}, {where!r})))"
    )
    done = run([sys.executable, "-c", code], {"PYTHONPATH": str(BENCH), **environment}, limit)
    found = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if done.returncode or not found:
        return {"ok": False, "output": done.stdout[-6000:]}
    records = json.loads(found[-1])
    failed = [f"{each['case']}: {each['failed']}" for each in records if "failed" in each]
    return {"ok": not failed, "records": records, "output": "\n".join(failed)}


def matrices(models: str, emulate: bool, limit: float) -> Record:
    """bench/matrix_gpu.py in a process of its own; what it said before an end is kept."""
    command = [sys.executable, BENCH / "matrix_gpu.py", "--models", models]
    done = run([*command, *(["--emulate"] if emulate else [])], {}, limit)
    records = []
    for line in done.stdout.splitlines():
        if line.startswith('{"case"') and line.endswith("}"):
            records.append(json.loads(line))
    failed = [record for record in records if not record["ok"]]
    found: Record = {"ok": done.returncode == 0 and bool(records) and not failed}
    found["records"] = records
    if not found["ok"]:
        found["output"] = "\n".join(each for each in done.stdout.splitlines() if each[:1] != "{")
        found["output"] = found["output"][-3000:]
    return found


def end_to_end(
    place: Path, gb: float, backends: Sequence[str], timed: Sequence[str], emulate: bool
) -> Record:
    """Merges of the same checkpoints on every backend: whether the bytes agree, and the seconds of
    those that are ``timed``."""
    missing = [name for name in ("pydantic", "typer", "rich") if not importlib.util.find_spec(name)]
    if missing:
        return {"ok": False, "skipped": f"not installed: {', '.join(missing)}; carry their wheels"}
    place.mkdir(exist_ok=True, parents=True)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=place.resolve()))
    try:
        made = run([sys.executable, BENCH / "models.py", work, "--gb", str(gb), "--models", "3"])
        if made.returncode:
            return {"ok": False, "output": made.stdout[-3000:]}
        everywhere = ("cpu", *backends)
        records = [merge(method, work, everywhere, timed, emulate) for method in METHODS]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"ok": all(record["same_bytes"] for record in records), "merges": records}


def merge(
    method: str, work: Path, backends: Sequence[str], timed: Sequence[str], emulate: bool
) -> Record:
    """One recipe on each backend; what is timed is run twice, the second counts."""
    own = "weight: 0.5" + ("" if method == "linear" else ", density: 0.3")
    lines = [f"merge_method: {method}", "models:"]
    for number in (1, 2, 3):
        lines.append(f"  - {{model: {work / f'tuned-{number}'}, parameters: {{{own}}}}}")
    if method != "linear":
        lines.append(f"base_model: {work / 'base'}")
    recipe = work / f"{method}.yaml"
    recipe.write_text("\n".join([*lines, "dtype: bfloat16", ""]))
    record: Record = {"method": method, "seconds": {}, "digests": {}}
    for backend in backends:
        environment = EMULATORS.get(backend, {}) if emulate else {}
        out = work / f"out-{backend}"
        program = [sys.executable, "-m", "pymerge.cli"]
        for _ in range(2 if backend in timed else 1):
            shutil.rmtree(out, ignore_errors=True)
            command: list[str | Path] = [*program, "merge", recipe, out, "--backend", backend]
            start = time.perf_counter()
            done = run([*command, "--no-sync"], environment)
            seconds = time.perf_counter() - start
            if done.returncode:
                break
        if done.returncode:
            record.setdefault("failed", {})[backend] = done.stdout[-3000:]
            continue
        if backend in timed:
            record["seconds"][backend] = seconds
        record["digests"][backend] = digest(out)
        shutil.rmtree(out)
    record["same_bytes"] = "failed" not in record and len(set(record["digests"].values())) == 1
    return record


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def gpu_line() -> Record:
    """The GPU, its driver and the toolkit, as far as they are there."""
    import torch

    version = run(["nvcc", "--version"])
    driver = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found: Record = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": version.stdout.splitlines()[-1] if version.returncode == 0 else None,
        "driver": driver.stdout.strip() if driver.returncode == 0 else None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def print_records(records: Sequence[Record]) -> None:
    for record in records:
        if "gb_per_s" not in record:
            what = record.get("skipped") or record.get("failed") or "called"
            print(f"{record['backend']:7} {record['case']:28} {what}")
            continue
        faster = [
            f"{record[key]:.1f}x {key.removeprefix('times_faster_than_')}"
            for key in record
            if key.startswith("times_faster_than_")
        ]
        print(
            f"{record['backend']:7} {record['case']:28} {record['ms']:9.3f} ms "
            f"{record['gb_per_s']:8.0f} GB/s {record['share_of_copy']:6.1%} of copy  "
            f"{', '.join(faster)}"
        )


def print_matrices(found: Record) -> None:
    for record in found["records"]:
        name = f"{record['case']:16} {record.get('model', ''):4} {record.get('shape', '')!s:16}"
        wrong = [
            f"{check['name']} {check['value']:.1e} > {check['bound']:.1e}"
            for check in record.get("checks", ())
            if not check["value"] <= check["bound"]
        ]
        if not record["ok"]:
            print(f"{name} {record.get('failed') or '; '.join(wrong)}")
        elif "seconds" not in record:
            rates = record.get("gflops_of", {})
            what = [f"{kind} {rate:.0f} GFLOP/s" for kind, rate in rates.items()]
            print(f"{name} {', '.join(what) or 'checked, not timed'}")
        else:
            faster = record.get("baseline_skipped", "")
            if "baseline_seconds" in record:
                faster = f"{record['times_faster']:.1f}x {record['baseline']}"
            print(
                f"{name} {record['seconds']:9.4f} s {record['share_of_gemm']:6.1%} of "
                f"{record['gemm']} GEMM, {record['peak_matrices']:.1f} matrices  {faster}"
            )
    print(found.get("output", ""))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--elements", type=int, default=1 << 27, help="of a tensor, for the ops")
    parser.add_argument("--gb", type=float, default=4.0, help="of a checkpoint, end to end")
    parser.add_argument("--dir", type=Path, default=BENCH / "work", help="for the checkpoints")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--skip", default="", help="steps: build, test, ops, matrix, merge")
    parser.add_argument("--models", default="8b,70b", help="whose shapes, for the matrix methods")
    parser.add_argument("--full", action="store_true", help="all cases on triton, too")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of a test or timing")
    parser.add_argument("--emulate", action="store_true", help="without a GPU; nothing is timed")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    return parser.parse_args()


class Results:
    """The JSON document, on disk after every step; without a folder nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self.document: Record = {"machine": machine_line(), "ops": []}
        stamp = self.document["machine"]["date"].replace(":", "").replace("-", "")[:15]
        self.path = None if folder is None else folder / f"gpu-{stamp}.json"
        if folder is not None:
            folder.mkdir(exist_ok=True, parents=True)

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.document, indent=1) + "\n")


def check_ops(
    arguments: argparse.Namespace, backend: str, skip: Sequence[str], results: Results
) -> bool:
    """Steps 2 and 3 on one backend; whether it is green."""
    environment = EMULATORS[backend] if arguments.emulate else {}
    document = results.document
    green = True
    if "test" not in skip:
        small = arguments.emulate or (backend == "triton" and not arguments.full)
        found = test(backend, environment, small, arguments.limit)
        document.setdefault("tests", {})[backend] = found
        green = found["ok"]
        print(f"tests on {backend}:", {k: v for k, v in found.items() if k != "output"})
        print(found.get("output", ""))
        results.save()
    if "ops" not in skip and green:
        timed = time_ops(backend, arguments.elements, environment, arguments.limit)
        document["ops"] += timed.get("records", [])
        document.setdefault("timing", {})[backend] = {"ok": timed["ok"], "output": timed["output"]}
        green = timed["ok"]
        print_records(timed.get("records", []))
        print(timed["output"])
        results.save()
    return green


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = parse()
    skip = arguments.skip.split(",")
    backends = arguments.backends.split(",")
    results = Results(None if arguments.emulate else arguments.results)
    document = results.document
    ok = True
    if "build" not in skip and not arguments.emulate:
        document["build"] = build(arguments.wheels)
        ok = document["build"]["ok"]
        print("build:", "done" if ok else document["build"])
        results.save()
    if not arguments.emulate:
        document["machine"] |= gpu_line()
    green = [each for each in backends if check_ops(arguments, each, skip, results)]
    ok &= green == backends
    if "matrix" not in skip:
        found = document["matrix"] = matrices(arguments.models, arguments.emulate, arguments.limit)
        ok &= found["ok"]
        print_matrices(found)
        results.save()
    if "merge" not in skip:
        timed = () if arguments.emulate else ("cpu", *green)
        document["merge"] = end_to_end(
            arguments.dir, arguments.gb, backends, timed, arguments.emulate
        )
        ok &= document["merge"]["ok"]
        print("merges:", json.dumps(document["merge"], indent=1))
        results.save()
    print(describe(document["machine"]))
    if results.path is not None:
        results.save()
        print(f"written to {results.path.name}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
