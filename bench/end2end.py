"""Whole merges, command against command: pymerge, the storage floor and mergekit, interleaved in
one run.

    python bench/end2end.py --gb 1 --models 3 --peer mergekit
    python bench/end2end.py --llama-7b --models 1 --methods linear,ties --memory 2GiB --repeat 1

Makes checkpoints (bench/models.py), then in every round and for every method measures the floor
(bench/floor.py), `pymerge merge` and `mergekit-yaml`, each in a fresh process: wall seconds, CPU
seconds (user + system) and peak resident memory as the kernel accounts them. The first round is the
gate: where the two outputs do not agree (bench/agreement.py) nothing is printed but that. Ends with
a table and a JSON file in bench/results.

All programs get the same recipe. Its default, ``dtype: bfloat16``, is what nearly every published
recipe says: mergekit then computes in bfloat16 (its fast way), pymerge in float32 with one
rounding. ``--dtype float32`` asks both for float32 arithmetic with ``out_dtype: bfloat16``.

This process stays small and imports nothing big: the kernel counts a parent's memory at the time of
the fork into the peak of its child.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import ROOT, describe, filesystem, machine_line

BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
PEER_ENVIRONMENT = ROOT / ".venv-peers"
#: Largest relative difference of a tensor. Rounding to bfloat16 at every step moves it by some
#: tenths of a percent; in TIES, which of many equal magnitudes survive is open, which moves it by
#: about one.
DIFFERENCE = 0.02
#: Largest deviation of the ratio of the updates' norms from 1: neither of the two changes it, but a
#: model, a weight, a trim or a sign election that differs does.
UPDATE = 0.01
#: For these mergekit rounds norms, directions or averages to bfloat16 before it scales them back,
#: an error of the whole update; in float64 it agrees with pymerge (tests/parity). The updates of
#: the models made here are orthogonal, so that Model Stock stays at the base and its own update is
#: nothing but rounding.
UPDATE_IN_BF16 = {"karcher": 0.05, "multislerp": 0.05, "nuslerp": 0.05, "model_stock": math.inf}
#: mergekit takes minutes for these (it sorts every tensor); one measurement needs no repeat.
SLOW_PEER_METHODS = ("ties", "breadcrumbs_ties", "della", "dare_ties", "sce")
#: Which elements survive is drawn at random: two merges agree in the size of their updates only.
RANDOM_METHODS = ("dare_ties", "dare_linear", "della", "della_linear")


@dataclass(frozen=True)
class Setup:
    """The recipe of a method: parameters of each model and of all, and who takes part.

    ``base``: ``apart`` where deltas are taken against it, ``model`` where it is one of the models,
    ``none`` where the recipe names none. ``num_models`` bounds the fine-tuned models that take
    part.
    """

    own: str = ""
    shared: str = ""
    base: str = "apart"
    num_models: int | None = None


SETUPS = {
    "linear": Setup("weight: 1.0", "normalize: true", "none"),
    "task_arithmetic": Setup("weight: 0.5", "lambda: 0.6"),
    "ties": Setup("weight: 1.0, density: 0.3", "normalize: true"),
    "dare_linear": Setup("weight: 0.5, density: 0.3"),
    "dare_ties": Setup("weight: 0.5, density: 0.3"),
    "della": Setup("weight: 0.5, density: 0.5, epsilon: 0.1"),
    "della_linear": Setup("weight: 0.5, density: 0.5, epsilon: 0.1"),
    "breadcrumbs": Setup("weight: 0.5, density: 0.3, gamma: 0.01"),
    "breadcrumbs_ties": Setup("weight: 0.5, density: 0.3, gamma: 0.01"),
    "sce": Setup(shared="select_topk: 0.2, smallest_sum: 1.0e-6"),
    "slerp": Setup(shared="t: 0.4", base="model", num_models=1),
    "nuslerp": Setup("weight: 0.5", base="none", num_models=2),
    "multislerp": Setup("weight: 0.5", base="none"),
    "karcher": Setup(base="none"),
    "model_stock": Setup(),
    "nearswap": Setup(shared="t: 0.001", num_models=1),
    "arcee_fusion": Setup(num_models=1),
    "ram": Setup(),
    "ramplus_tl": Setup(),
}


@dataclass(frozen=True)
class Usage:
    """What one process took."""

    wall: float
    cpu: float
    peak_mib: float
    merge_seconds: float | None = None


@dataclass
class Program:
    """All runs of one program on one method."""

    runs: list[Usage] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return statistics.median(run.wall for run in self.runs)

    @property
    def merging(self) -> float | None:
        """Median of the seconds that the program counts for the merge, without its start."""
        seconds = [run.merge_seconds for run in self.runs if run.merge_seconds is not None]
        return statistics.median(seconds) if seconds else None

    def as_json(self) -> dict[str, Any]:
        walls = sorted(run.wall for run in self.runs)
        return {
            "wall_median": self.wall,
            "merge_seconds_median": self.merging,
            "wall_spread": [walls[0], walls[-1]],
            "cpu_median": statistics.median(run.cpu for run in self.runs),
            "peak_mib_max": max(run.peak_mib for run in self.runs),
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass
class Comparison:
    """Everything measured for one method."""

    method: str
    inputs: list[Path]
    recipe: Path
    pymerge: Program = field(default_factory=Program)
    peer: Program = field(default_factory=Program)
    floors: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, Any] | None = None
    tight: dict[str, Any] | None = None

    @property
    def floor(self) -> float:
        seconds: float = statistics.median(floor["seconds"] for floor in self.floors)
        return seconds

    def as_json(self) -> dict[str, Any]:
        document = {
            "method": self.method,
            "recipe": self.recipe.read_text(),
            "floor_median": self.floor,
            "floor_fraction": self.floor / self.pymerge.wall,
            "floor_fraction_without_start": self.floor / (self.pymerge.merging or math.nan),
            "floors": self.floors,
            "pymerge": self.pymerge.as_json(),
        }
        if self.peer.runs:
            document["mergekit"] = self.peer.as_json()
            document["times_faster"] = self.peer.wall / self.pymerge.wall
            document["agreement"] = self.agreement
        if self.tight:
            document["tight_memory"] = self.tight
        return document


#: The first line of pymerge's summary.
SUMMARY = re.compile(r"merged by \w+.* in ([\d.]+) s$", re.MULTILINE)


class Failed(Exception):
    """A program failed or the outputs do not agree."""


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Usage:
    """Run a command to its end and account for it; its output is shown only where it fails.

    Seconds of the merge alone are read from pymerge's summary, where it prints one.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
        if process.returncode:
            tail = text[-3000:]
            raise Failed(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{tail}")
    told = SUMMARY.search(text)
    merging = float(told[1]) if told else None
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, merging)


def ask(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a script of this folder in its own process and read the JSON object it prints."""
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def write_recipe(method: str, work: Path, num_models: int, dtype: str) -> Comparison:
    """The recipe of a method as a YAML file, and the checkpoints it reads."""
    base = work / "base"
    tuned = [work / f"tuned-{number}" for number in range(1, num_models + 1)]
    lines = [f"merge_method: {method.partition('-')[0]}"]
    models: Sequence[Path | str]
    if method == "linear-self":
        # A recipe names a model once; the same folder in other words is read once all the same.
        setup = Setup("weight: 0.5", "normalize: true", "none")
        models, inputs = [base, f"{base}/."], [base]
    else:
        setup = SETUPS[method]
        chosen = tuned[: setup.num_models]
        alone = setup.base == "none" and len(chosen) == 1
        models = inputs = [base, *chosen] if alone or setup.base == "model" else chosen
        if setup.base != "none":
            lines.append(f"base_model: {base}")
            inputs = [base, *chosen]
    own = f", parameters: {{{setup.own}}}" if setup.own else ""
    lines.append("models:")
    lines += [f"  - {{model: {model}{own}}}" for model in models]
    if setup.shared:
        lines.append(f"parameters: {{{setup.shared}}}")
    lines.append(f"dtype: {dtype}")
    if dtype != "bfloat16":
        lines.append("out_dtype: bfloat16")
    recipe = work / f"{method}.yaml"
    recipe.write_text("\n".join(lines) + "\n")
    return Comparison(method, inputs, recipe)


def weight_files(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file."""
    found = {}
    for file in weight_files([folder]):
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        found[file.name] = digest.hexdigest()
    return found


def drop_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the pages of ``files``."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def agree(method: str, report: dict[str, Any]) -> bool:
    """Whether two outputs are the same merge, by what agreement.py reports."""
    if not report["same_layout"]:
        return False
    ratio: float | None = report["update_ratio"]
    if method in RANDOM_METHODS:
        return ratio is not None and abs(ratio - 1) <= UPDATE
    difference: float = report["largest_relative_difference"]
    update = UPDATE_IN_BF16.get(method, UPDATE)
    return difference <= DIFFERENCE and (ratio is None or abs(ratio - 1) <= update)


class Runner:
    """Runs the programs on the checkpoints in one folder."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.ours, self.theirs = work / "out-pymerge", work / "out-mergekit"

    def settle(self, comparison: Comparison) -> None:
        """Nothing left to write back; the inputs in the state of the cache that was asked for."""
        os.sync()
        if self.arguments.cold:
            drop_cache(weight_files(comparison.inputs))

    def floor(self, comparison: Comparison) -> None:
        self.settle(comparison)
        written = sum(file.stat().st_size for file in weight_files([self.work / "base"]))
        comparison.floors.append(
            ask(
                "floor.py",
                *("--out", self.work / "floor.bin", "--out-bytes", str(written)),
                "--sync" if self.arguments.sync else "--no-sync",
                *weight_files(comparison.inputs),
            )
        )

    def pymerge(self, comparison: Comparison, memory: str, out: Path) -> Usage:
        """One merge into an empty folder."""
        self.settle(comparison)
        command: list[str | Path] = [
            Path(sys.executable).parent / "pymerge",
            *("merge", comparison.recipe, out),
            *("--memory", memory, "--threads", str(self.arguments.threads)),
        ]
        if not self.arguments.sync:
            command.append("--no-sync")
        return run(command)

    def mergekit(self, comparison: Comparison) -> None:
        self.settle(comparison)
        shutil.rmtree(self.theirs, ignore_errors=True)
        command = [PEER_ENVIRONMENT / "bin" / "mergekit-yaml", comparison.recipe, self.theirs]
        options = ["--no-copy-tokenizer", "--quiet"]
        usage = run([*command, *options], {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"})
        comparison.peer.runs.append(usage)

    def round(self, comparison: Comparison, number: int) -> None:
        """One interleaved round; the first is the gate."""
        method, peer = comparison.method, self.arguments.peer
        say(f"round {number + 1}, {method}")
        self.floor(comparison)
        shutil.rmtree(self.ours, ignore_errors=True)
        comparison.pymerge.runs.append(self.pymerge(comparison, self.arguments.memory, self.ours))
        if peer and (number == 0 or method not in SLOW_PEER_METHODS):
            self.mergekit(comparison)
        if number == 0 and peer:
            comparison.agreement = ask("agreement.py", self.ours, self.theirs, self.work / "base")
            if not agree(method, comparison.agreement):
                raise Failed(f"{method}: the outputs do not agree: {comparison.agreement}")
        if number == 0 and self.arguments.tight_memory:
            self.tight(comparison)
        shutil.rmtree(self.theirs, ignore_errors=True)
        shutil.rmtree(self.ours, ignore_errors=True)

    def tight(self, comparison: Comparison) -> None:
        """The same merge in less memory must give the same bytes."""
        out = self.work / "out-tight"
        shutil.rmtree(out, ignore_errors=True)
        usage = self.pymerge(comparison, self.arguments.tight_memory, out)
        same = digests(out) == digests(self.ours)
        shutil.rmtree(out)
        comparison.tight = {
            "memory": self.arguments.tight_memory,
            **asdict(usage),
            "same_bytes": same,
        }
        if not same:
            raise Failed(f"{comparison.method}: other bytes with {comparison.tight['memory']}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(comparisons: Sequence[Comparison]) -> None:
    """The last two columns are floor fractions: of the whole command, and of its merge alone, which
    leaves out the start of Python as the floor's own seconds do."""
    head = (
        "method",
        "program",
        "wall s",
        "spread",
        "CPU s",
        "peak MiB",
        "x faster",
        "floor",
        "merging",
    )
    rows: list[tuple[str, ...]] = [head]
    for comparison in comparisons:
        ours = comparison.pymerge
        peer = comparison.peer if comparison.peer.runs else None
        for name, program in (("pymerge", ours), ("mergekit", peer)):
            if program is None:
                continue
            figures = program.as_json()
            mine = program is ours
            rows.append(
                (
                    comparison.method,
                    name,
                    f"{program.wall:.2f}",
                    "{:.2f}-{:.2f}".format(*figures["wall_spread"]),
                    f"{figures['cpu_median']:.2f}",
                    f"{figures['peak_mib_max']:.0f}",
                    f"{peer.wall / ours.wall:.1f}" if mine and peer else "",
                    f"{comparison.floor / ours.wall:.2f}" if mine else "",
                    f"{comparison.floor / (ours.merging or math.nan):.2f}" if mine else "",
                )
            )
        floors = [floor["seconds"] for floor in comparison.floors]
        spread = f"{min(floors):.2f}-{max(floors):.2f}"
        cpu = statistics.median(floor["cpu"] for floor in comparison.floors)
        cells = (f"{comparison.floor:.2f}", spread, f"{cpu:.2f}", *[""] * 4)
        rows.append((comparison.method, "floor", *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*left, *right]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of one checkpoint in 1e9 bytes")
    parser.add_argument("--llama-7b", action="store_true", help="the exact shapes of Llama 7B")
    parser.add_argument("--models", type=int, default=3, help="fine-tuned models beside the base")
    parser.add_argument("--methods", default="linear,task_arithmetic,ties")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--tight-memory", help="once more with this: must give the same bytes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=BENCH / "work", help="where the data goes")
    parser.add_argument("--peer", choices=("mergekit",))
    parser.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--name", default="end2end", help="of the file in bench/results")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, work: Path) -> list[Comparison]:
    say(f"writing {arguments.models + 1} checkpoints to {work}")
    size = ["--llama-7b"] if arguments.llama_7b else ["--gb", str(arguments.gb)]
    models = ["--models", str(arguments.models)]
    run([sys.executable, BENCH / "models.py", work, *size, *models])
    comparisons = [
        write_recipe(method, work, arguments.models, arguments.dtype)
        for method in arguments.methods.split(",")
    ]
    runner = Runner(arguments, work)
    for number in range(arguments.repeat):
        for comparison in comparisons:
            runner.round(comparison, number)
    return comparisons


def main() -> None:
    arguments = parse()
    if arguments.peer and not (PEER_ENVIRONMENT / "bin" / "mergekit-yaml").exists():
        sys.exit(f"mergekit is not installed in {PEER_ENVIRONMENT.name}: run `make bench-peers`")
    work = (arguments.dir / f"end2end-{os.getpid()}").resolve()
    work.mkdir(parents=True)
    machine = machine_line() | {"filesystem": filesystem(work)}
    if arguments.peer:
        machine["peers"] = peer_versions()
    try:
        comparisons = measure(arguments, work)
        document = {
            "machine": machine,
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in vars(arguments).items()
                if key not in ("dir", "keep")
            },
            "input_cache": "dropped before every run" if arguments.cold else "as the run left it",
            "methods": [comparison.as_json() for comparison in comparisons],
        }
    except Failed as failure:
        sys.exit(f"no figures: {failure}")
    finally:
        if not arguments.keep:
            shutil.rmtree(work)
    print(describe(machine) + f", {machine['filesystem']}")
    copy = max(floor["copy_gb_per_s"] for c in comparisons for floor in c.floors)
    print(f"dtype: {arguments.dtype}; memory copy {copy:.1f} GB/s (read + written)")
    print_table(comparisons)
    RESULTS.mkdir(exist_ok=True)
    stamp = machine["date"].replace(":", "").replace("-", "")[:15]
    path = RESULTS / f"{arguments.name}-{stamp}.json"
    path.write_text(json.dumps(document, indent=1).replace(str(work), "DIR") + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def peer_versions() -> dict[str, str]:
    """Versions that decide what mergekit computes."""
    code = (
        "import json, importlib.metadata as m; "
        "print(json.dumps({p: m.version(p) for p in ('mergekit', 'torch', 'transformers')}))"
    )
    done = subprocess.run(
        [PEER_ENVIRONMENT / "bin" / "python", "-c", code], capture_output=True, check=True
    )
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


if __name__ == "__main__":
    main()
