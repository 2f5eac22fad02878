"""Build, check and time the GPU backends on a machine that has a GPU: one command, one JSON.

    python bench/gpu_check.py                       # everything
    python bench/gpu_check.py --wheels wheels       # with wheels carried along for the full command
    python bench/gpu_check.py --emulate             # every step that needs no GPU, nothing is timed

Needs torch, triton, numpy, safetensors, pybind11, cmake, ninja, nvcc, pytest and hypothesis, no
package index. In order: (1) build pymerge with CUDA kernels in place; (2) run the tests of every op
on cuda and triton against the reference, byte by byte; (3) time every op (bench/ops_gpu.py); (4)
merge checkpoints from the page cache on the GPU and on the CPU, compare the bytes and the seconds.
A step that fails is recorded and the next ones still run, but no rate is printed where the tests
are red. Step 4 needs what the command line needs (pydantic, typer, ...) and says so where it is
missing. The JSON goes to bench/results; with ``--emulate`` nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import ROOT, describe, machine_line

BENCH = ROOT / "bench"
BACKENDS = ("cuda", "triton")
METHODS = ("linear", "ties", "dare_ties")
EMULATORS = {"cuda": {"PYMERGE_CUDA_EMULATE": "1"}, "triton": {"TRITON_INTERPRET": "1"}}
Record = dict[str, Any]


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(wheels: Path | None) -> Record:
    """Install in place, with CUDA required; wheels first where there are some."""
    start = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--quiet"]
    if wheels is not None:
        done = run([*pip, *sorted(wheels.glob("*.whl"))])
        if done.returncode:
            return {"ok": False, "wheels": done.stdout[-3000:]}
    options = ["--no-deps", "--no-build-isolation", "--editable", "."]
    done = run([*pip, *options], PYMERGE_CMAKE_ARGS="-DPYMERGE_CUDA=ON")
    record: Record = {"ok": done.returncode == 0, "seconds": time.perf_counter() - start}
    if done.returncode:
        record["output"] = done.stdout[-6000:]
    return record


def test(backend: str, environment: dict[str, str]) -> Record:
    """The shared table of cases on a backend, against the reference."""
    start = time.perf_counter()
    name = {"triton": "triton-interpreter", "cuda": "cuda-emulated"}[backend]
    chosen = name if environment else f"{backend} and not interpreter and not emulated"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = run([*command, "tests/ops", "-k", chosen], **environment)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)
    }
    ran = counts.get("passed", 0) > 0
    record: Record = {
        "ok": done.returncode == 0 and ran,
        "seconds": time.perf_counter() - start,
        **counts,
    }
    if not record["ok"]:
        record["output"] = done.stdout[-6000:]
    return record


def time_ops(backend: str, num_elements: int, environment: dict[str, str]) -> Record:
    """bench/ops_gpu.py in a process of its own, so that a crash costs one backend only."""
    where = "cpu" if environment else "cuda"
    code = (
        "import json, ops_gpu; "
        f"print(json.dumps(ops_gpu.measure({backend!r}, {num_elements}, {where!r})))"
    )
    done = run([sys.executable, "-c", code], PYTHONPATH=str(BENCH), **environment)
    if done.returncode:
        return {"ok": False, "output": done.stdout[-6000:]}
    return {"ok": True, "records": json.loads(done.stdout.splitlines()[-1])}


def end_to_end(gb: float, backends: Sequence[str], emulate: bool) -> Record:
    """Merges of the same checkpoints on every backend: seconds, and whether the bytes agree."""
    missing = [name for name in ("pydantic", "typer", "rich") if not importlib.util.find_spec(name)]
    if missing:
        return {"ok": False, "skipped": f"not installed: {', '.join(missing)}; carry their wheels"}
    work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=BENCH))
    try:
        made = run([sys.executable, BENCH / "models.py", work, "--gb", str(gb), "--models", "3"])
        if made.returncode:
            return {"ok": False, "output": made.stdout[-3000:]}
        records = [merge(method, work, ("cpu", *backends), emulate) for method in METHODS]
    finally:
        shutil.rmtree(work)
    return {"ok": all(record["same_bytes"] for record in records), "merges": records}


def merge(method: str, work: Path, backends: Sequence[str], emulate: bool) -> Record:
    """One recipe on each backend; every merge is run twice, the second counts."""
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
        program = Path(sys.executable).with_name("pymerge")
        for _ in range(1 if emulate else 2):
            shutil.rmtree(out, ignore_errors=True)
            command = [program, "merge", recipe, out, "--backend", backend, "--no-sync"]
            start = time.perf_counter()
            done = run(command, **environment)
            seconds = time.perf_counter() - start
            if done.returncode:
                record["same_bytes"] = False
                record["output"] = done.stdout[-3000:]
                return record
        if not emulate:
            record["seconds"][backend] = seconds
        record["digests"][backend] = digest(out)
        shutil.rmtree(out)
    record["same_bytes"] = len(set(record["digests"].values())) == 1
    return record


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def gpu_line() -> Record:
    """The GPU, its driver and the toolkit."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    nvcc = shutil.which("nvcc")
    version = run([nvcc, "--version"]).stdout.splitlines()[-1] if nvcc else None
    driver = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": version,
        "driver": driver.stdout.strip() if driver.returncode == 0 else None,
    }


def print_records(records: Sequence[Record]) -> None:
    for record in records:
        if "gb_per_s" not in record:
            print(f"{record['backend']:7} {record['case']:28} {record.get('skipped', 'called')}")
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--elements", type=int, default=1 << 27, help="of a tensor, for the ops")
    parser.add_argument("--gb", type=float, default=4.0, help="of a checkpoint, end to end")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--skip", default="", help="steps: build, test, ops, merge")
    parser.add_argument("--emulate", action="store_true", help="without a GPU; nothing is timed")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    skip = arguments.skip.split(",")
    backends = arguments.backends.split(",")
    document: Record = {"machine": machine_line(), "ops": []}
    ok = True
    if "build" not in skip and not arguments.emulate:
        document["build"] = build(arguments.wheels)
        ok &= document["build"]["ok"]
        print("build:", "done" if ok else document["build"])
    if not arguments.emulate:
        document["machine"] |= gpu_line()
    for backend in backends:
        environment = EMULATORS[backend] if arguments.emulate else {}
        green = True
        if "test" not in skip:
            found = document.setdefault("tests", {})[backend] = test(backend, environment)
            green = found["ok"]
            print(f"tests on {backend}:", {k: v for k, v in found.items() if k != "output"})
            print(found.get("output", ""))
        if "ops" not in skip and green:
            timed = time_ops(backend, arguments.elements, environment)
            document["ops"] += timed.get("records", [])
            green = timed["ok"]
            print(timed.get("output", ""))
        ok &= green
    print_records(document["ops"])
    if "merge" not in skip:
        document["merge"] = end_to_end(arguments.gb, backends, arguments.emulate)
        ok &= document["merge"]["ok"]
        print("merges:", json.dumps(document["merge"], indent=1))
    print(describe(document["machine"]))
    if not arguments.emulate:
        stamp = document["machine"]["date"].replace(":", "").replace("-", "")[:15]
        arguments.results.mkdir(exist_ok=True, parents=True)
        path = arguments.results / f"gpu-{stamp}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {path.name}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
