"""Many small tensors: seconds to plan and to merge 5k, 10k and 20k of them, and against mergekit.

    python bench/many_tensors.py                         ours only
    python bench/many_tensors.py --peer 2000             and mergekit on that many, interleaved

Each model is one file: a Llama of very many layers of width 16 in bfloat16; base and two models,
TIES. The number of tensors is that asked for, rounded to whole layers.
Every figure is the median of ``--repeat`` processes. Seconds for each tensor that do not grow with
the number say that the time is linear. CPU seconds are told beside wall seconds: on a machine that
does other things only they mean much. Writes a JSON file to bench/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from end2end import PEER_ENVIRONMENT, RESULTS, run
from machine import describe, filesystem, machine_line

#: Rows and columns of a matrix, tensors of a layer.
SIDE, LAYER = 16, 9

WRITE = """
import json, sys
import numpy as np
folder, layers, seed, side = sys.argv[1], *map(int, sys.argv[2:5])
square, row = [side, side], [side]
parts = {f"self_attn.{p}_proj": square for p in "qkvo"}
parts |= {f"mlp.{p}_proj": square for p in ("gate", "up", "down")}
parts |= {"input_layernorm": row, "post_attention_layernorm": row}
shapes = {"model.embed_tokens": square}
shapes |= {f"model.layers.{i}.{p}": parts[p] for i in range(layers) for p in parts}
shapes |= {"model.norm": row, "lm_head": square}
header, end = {"__metadata__": {"format": "pt"}}, 0
for name, shape in shapes.items():
    size = 2 * side ** len(shape)
    header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
    end += size
count = end // 2
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
base = np.random.default_rng(0).standard_normal(count, np.float32) * np.float32(0.02)
values = base + np.random.default_rng(seed).standard_normal(base.size, np.float32) * np.float32(
    0.001 if seed else 0)
with open(folder + "/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
          "num_hidden_layers": layers, "hidden_size": side, "intermediate_size": side,
          "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": side,
          "tie_word_embeddings": False}
open(folder + "/config.json", "w").write(json.dumps(config))
"""

#: Plan and merge apart, in a process of its own.
OURS = """
import json, sys, time
from pymerge import api
begin, cpu = time.perf_counter(), time.process_time()
plan = api.plan(sys.argv[1], memory="2GiB")
planned, planned_cpu = time.perf_counter(), time.process_time()
api.merge(plan, sys.argv[2])
print(json.dumps({"plan": planned - begin, "plan_cpu": planned_cpu - cpu,
                  "merge": time.perf_counter() - planned,
                  "merge_cpu": time.process_time() - planned_cpu}))
"""


def make(work: Path, count: int) -> Path:
    """Base, two models and a recipe; returns the recipe."""
    for seed in range(3):
        folder = work / f"{count}-{seed}"
        folder.mkdir()
        numbers = map(str, (count // LAYER, seed, SIDE))
        subprocess.run([sys.executable, "-c", WRITE, str(folder), *numbers], check=True)
    settings = "{weight: 0.5, density: 0.3}"
    lines = ["merge_method: ties", f"base_model: {work}/{count}-0", "models:"]
    lines += [f"  - {{model: {work}/{count}-{n}, parameters: {settings}}}" for n in (1, 2)]
    recipe = work / f"{count}.yml"
    recipe.write_text("\n".join([*lines, "dtype: bfloat16"]) + "\n")
    return recipe


def ours(recipe: Path, out: Path) -> dict[str, float]:
    """Seconds of planning and merging by the API."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", OURS, str(recipe), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def against_peer(recipe: Path, work: Path, repeat: int) -> dict[str, Any]:
    """Wall seconds of both commands, start-up included, in turns."""
    programs = {
        "pymerge": [Path(sys.executable).parent / "pymerge", "merge", recipe, work / "ours"],
        "mergekit": [
            PEER_ENVIRONMENT / "bin" / "mergekit-yaml",
            *(recipe, work / "theirs", "--no-copy-tokenizer", "--quiet"),
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeat):
        for name, command in programs.items():
            shutil.rmtree(work / "ours", ignore_errors=True)
            shutil.rmtree(work / "theirs", ignore_errors=True)
            seconds[name].append(run(command, {"HF_HUB_OFFLINE": "1"}).wall)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "medians": medians,
        "times_faster": medians["mergekit"] / medians["pymerge"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--counts", default="5000,10000,20000")
    parser.add_argument("--peer", type=int, default=0, help="tensors of the comparison, 0 for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    machine = machine_line()
    print(describe(machine))
    document: dict[str, Any] = {
        "machine": machine,
        "filesystem": filesystem(arguments.dir),
        "recipe": "ties of a base and two models, a Llama of width 16 in bfloat16",
        "tensors": {},
    }
    work = Path(tempfile.mkdtemp(prefix="pymerge-many-", dir=arguments.dir))
    try:
        for count in map(int, arguments.counts.split(",")):
            recipe = make(work, count)
            runs = [ours(recipe, work / "out") for _ in range(arguments.repeat)]
            medians = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
            each = {key: round(value / count * 1e6, 1) for key, value in medians.items()}
            document["tensors"][count] = {"seconds": medians, "microseconds_each": each}
            print(f"{count} tensors, microseconds each: {each}")
        if arguments.peer:
            found = against_peer(make(work, arguments.peer), work, arguments.repeat)
            document["against_mergekit"] = {"tensors": arguments.peer, **found}
            print(f"{arguments.peer} tensors against mergekit: {found['times_faster']:.1f} times")
    finally:
        shutil.rmtree(work)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = RESULTS / f"many-tensors-{stamp}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
