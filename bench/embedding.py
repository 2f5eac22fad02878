"""An embedding that is larger than the memory: base and three models of one bfloat16 tensor of
128k x 8192 elements (2.1 GB each) merged by TIES within ``--memory 2GiB``.

    python bench/embedding.py                          needs about 11 GB on disk, removed afterwards
    python bench/embedding.py --rows 16384 --memory 512MiB

The merge runs as the command, in a process of its own; its peak is what the kernel accounts for it.
A sample of rows is compared with a TIES in float64 of the same elements whose thresholds are the
exact order statistics of the whole task vectors. Writes a JSON file to bench/results and exits with
1 where the peak is over the memory or the rows differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from end2end import RESULTS, Usage, run
from machine import describe, filesystem, machine_line

NAME = "model.embed_tokens.weight"
DENSITY, WEIGHT, NUM_MODELS = 0.3, 0.5, 3
SAMPLED_ROWS = 256
#: Rounding to bfloat16 of a value of the base's size.
TOLERANCE = 2**-8

#: Run in a process of its own, so that this one stays small: the kernel counts a parent's memory
#: into the peak of its child.
WRITE = """
import json, sys
import numpy as np
folder, rows, columns, seed = sys.argv[1], *map(int, sys.argv[2:5])
def pool(seed, scale):
    values = np.random.default_rng(seed).standard_normal(1 << 22, np.float32) * np.float32(scale)
    return values
base, noise = pool(0, 0.02), pool(seed, 1e-3)
offsets = np.random.default_rng([seed, 1])
size = rows * columns * 2
header = json.dumps({"__metadata__": {"format": "pt"}, NAME: {"dtype": "BF16",
    "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
header += b" " * (-len(header) % 8)
with open(folder + "/model.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    left = rows * columns
    shifts = np.random.default_rng(7)
    while left:
        n = min(left, 1 << 20)
        first = int(shifts.integers(0, len(base) - n + 1))
        values = base[first:first + n].copy()
        if seed:
            second = int(offsets.integers(0, len(noise) - n + 1))
            values += noise[second:second + n]
        bits = values.view(np.uint32)
        file.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())
        left -= n
open(folder + "/config.json", "w").write('{"model_type": "llama", "torch_dtype": "bfloat16"}')
""".replace("NAME", repr(NAME))

#: Thresholds by histograms of the 16 highest bits and then of all bits of the float32 magnitudes,
#: so that no more than a chunk is in memory; prints the largest difference of the sampled rows.
CHECK = """
import sys
import numpy as np
out, base, *models = sys.argv[5:]
rows, columns, sampled = map(int, sys.argv[1:4])
density, weight = map(float, sys.argv[4].split(","))
def elements(folder):
    path = folder + "/model.safetensors"
    start = 8 + int.from_bytes(open(path, "rb").read(8), "little")
    return np.memmap(path, np.uint16, "r", start, (rows * columns,))
def value(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)
def chunks(base, model):
    for first in range(0, len(base), 1 << 22):
        part = slice(first, first + (1 << 22))
        yield np.abs(value(model[part]) - value(base[part])).view(np.uint32)
def threshold(base, model):
    left = int(density * len(base))
    counts = sum(np.bincount(keys >> 16, minlength=1 << 16) for keys in chunks(base, model))
    high = (1 << 16) - 1
    while counts[high] < left:
        left -= counts[high]
        high -= 1
    low = sum(np.bincount(keys[keys >> 16 == high] & 0xFFFF, minlength=1 << 16)
              for keys in chunks(base, model))
    digit = (1 << 16) - 1
    while low[digit] < left:
        left -= low[digit]
        digit -= 1
    # Of the equal ones the first are kept; the sampled rows are compared without them.
    return np.uint32(high << 16 | digit).view(np.float32)
b, *m, o = map(elements, (base, *models, out))
edges = [threshold(b, each) for each in m]
chosen = np.random.default_rng(3).choice(rows, sampled, replace=False)
worst = 0.0
for row in chosen:
    part = slice(row * columns, (row + 1) * columns)
    start = value(b[part]).astype(np.float64)
    deltas = np.stack([(value(each[part]) - value(b[part])) for each in m])
    sizes = np.abs(deltas)
    open_ = (sizes == np.array(edges)[:, None]).any(0)
    kept = np.where(sizes >= np.array(edges)[:, None], deltas, 0).astype(np.float64)
    sign = np.where(kept.sum(0) >= 0, 1.0, -1.0)
    mask = np.sign(kept) == sign
    count = (weight * mask).sum(0)
    merged = start + (weight * kept * mask).sum(0) / np.where(count == 0, 1, count)
    found = value(o[part]).astype(np.float64)
    error = np.abs(found - merged) / np.maximum(np.abs(merged), 1e-6)
    # NaN is larger than nothing, and would pass.
    worst = max(worst, float(np.where(np.isnan(error), np.inf, error)[~open_].max(initial=0)))
print(worst)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=128 * 1024)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    machine = machine_line()
    print(describe(machine))
    work = Path(tempfile.mkdtemp(prefix="pymerge-embedding-", dir=arguments.dir))
    try:
        document = measure(arguments, work)
    finally:
        shutil.rmtree(work)
    document["machine"] = machine
    document["filesystem"] = filesystem(arguments.dir)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = RESULTS / f"embedding-{stamp}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in document if key != "machine"}, indent=1))
    print(path)
    return 0 if document["within_memory"] and document["agrees"] else 1


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the models, merge, compare."""
    size = [str(arguments.rows), str(arguments.columns)]
    folders = [work / name for name in ("base", *(f"model-{n}" for n in range(1, NUM_MODELS + 1)))]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        command = [sys.executable, "-c", WRITE, str(folder), *size, str(seed)]
        subprocess.run(command, check=True)
    lines = ["merge_method: ties", f"base_model: {folders[0]}", "models:"]
    settings = f"{{weight: {WEIGHT}, density: {DENSITY}}}"
    lines += [f"  - {{model: {folder}, parameters: {settings}}}" for folder in folders[1:]]
    recipe = work / "ties.yml"
    recipe.write_text("\n".join([*lines, "dtype: bfloat16"]) + "\n")
    out = work / "out"
    program = Path(sys.executable).parent / "pymerge"
    usage = run([program, "merge", recipe, out, "--memory", arguments.memory])
    return {
        "tensor": [arguments.rows, arguments.columns],
        "models": NUM_MODELS,
        "memory": arguments.memory,
        **told(usage, arguments.memory),
        **compared(out, folders, size),
    }


def told(usage: Usage, memory: str) -> dict[str, Any]:
    """Seconds and peak of the merge, and whether that is within the memory it was given."""
    units = {"KiB": 2**-10, "MiB": 1, "GiB": 2**10}
    given = float(memory[:-3]) * units[memory[-3:]]
    return {
        "seconds": round(usage.wall, 2),
        "cpu_seconds": round(usage.cpu, 2),
        "peak_mib": round(usage.peak_mib, 1),
        "memory_mib": given,
        "within_memory": usage.peak_mib <= given,
    }


def compared(out: Path, folders: list[Path], size: list[str]) -> dict[str, Any]:
    """The largest relative difference of the sampled rows from TIES in float64."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", CHECK, *size, str(SAMPLED_ROWS), f"{DENSITY},{WEIGHT}"]
    done = subprocess.run(
        [*command, str(out), *map(str, folders)], capture_output=True, text=True, check=True
    )
    worst = float(done.stdout)
    return {
        "sampled_rows": SAMPLED_ROWS,
        "largest_relative_difference": worst,
        "agrees": worst <= TOLERANCE,
        "check_seconds": round(time.perf_counter() - begin, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
