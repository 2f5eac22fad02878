"""pymerge.Session: merging again in memory, against one read of the inputs from RAM.

    python bench/session.py --gb 1               models of 1 GB each, bfloat16, Llama's shapes
    python bench/session.py --demo               a random search over the demo's experts

The read is a sum of every 8 bytes of every input, by numpy, by as many threads as the merge has. In
each round all of it is timed once: the read, then a merge with new weights for each method, into
the tensors of one more model. ``ratio`` is the median merge over the median read of that method's
inputs (linear has no base); ``cpu_ratio`` is that of the CPU times of both, which a busy machine
disturbs less. ``first_s`` is the first merge, which measures; the tensors it writes
have been touched before.

The search draws a weight for each expert, merges into the live network, and takes the mean accuracy
on the tasks' selection images; the best one and equal weights are then told on the test images. It
needs the demo's packages and trains its models (about a minute) unless they lie in --models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import describe, machine_line
from models import shape_of_size
from numpy.typing import NDArray

import pymerge

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "ties-model": {"density": 0.2, "trim_scope": "model"},
    "slerp": {},
}
PIECE_BYTES = 1 << 22


def make_models(gigabytes: float, num: int) -> list[dict[str, torch.Tensor]]:
    """A base and models made of it, bfloat16, whose noise repeats every few million elements."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 22, generator=generator)
    models: list[dict[str, torch.Tensor]] = []
    for number in range(num):
        state = {}
        for place, (name, shape) in enumerate(shape_of_size(gigabytes).tensors()):
            noise = torch.roll(pool, 7919 * place + 104729 * number)
            size = torch.Size(shape).numel()
            tensor = torch.empty(size, dtype=torch.bfloat16)
            for first in range(0, size, len(pool)):
                part = tensor[first : first + len(pool)]
                values = noise[: len(part)] * (1e-3 if number else 0.02)
                if number:
                    values += models[0][name].view(-1)[first : first + len(part)]
                part.copy_(values)
            state[name] = tensor.view(shape)
        models.append(state)
    return models


class Times(NamedTuple):
    """Seconds on the clock and of all CPUs."""

    wall: float
    cpu: float


@contextmanager
def timed(rows: list[Times]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    rows.append(Times(time.perf_counter() - wall, time.process_time() - cpu))


def pieces_of(models: Sequence[dict[str, torch.Tensor]]) -> list[NDArray[np.uint64]]:
    """All elements, eight bytes at a time, in pieces."""
    pieces = []
    for model in models:
        for tensor in model.values():
            flat = tensor.view(-1).view(torch.uint8).numpy()
            words = flat[: flat.size // 8 * 8].view(np.uint64)
            step = PIECE_BYTES // 8
            pieces += [words[first : first + step] for first in range(0, words.size, step)]
    return pieces


def read(pieces: Sequence[NDArray[np.uint64]], pool: ThreadPoolExecutor, threads: int) -> None:
    """One sum over all pieces, by all threads."""

    def add(first: int) -> None:
        for piece in pieces[first::threads]:
            np.add.reduce(piece)

    list(pool.map(add, range(threads)))


def weights_of(name: str, number: int, num: int) -> dict[str, Any]:
    """Other coefficients in each round."""
    if name == "slerp":
        return {"t": 0.1 + 0.05 * number}
    return {"weights": [0.3 + 0.01 * number + 0.1 * k for k in range(num)]}


def time_merges(arguments: argparse.Namespace) -> dict[str, Any]:
    models = make_models(arguments.gb, 1 + arguments.experts)
    out = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    threads = arguments.threads or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(threads)
    sessions, first, inputs = {}, {}, {}
    for name in arguments.methods:
        method, experts = name.split("-")[0], models[1:]
        base: dict[str, torch.Tensor] | None = models[0]
        if method == "linear":
            base = None
        if method == "slerp":
            experts = models[1:2]
        session = pymerge.Session(
            base, experts, method=method, threads=threads, backend="cpu", **METHODS[name]
        )
        start = time.perf_counter()
        session.merge(out=out, **weights_of(name, 0, len(experts)))
        first[name] = time.perf_counter() - start
        sessions[name] = (session, len(experts))
        inputs[name] = [*experts, *([] if base is None else [base])]
    pieces = {name: pieces_of(models) for name, models in inputs.items()}
    reads: dict[str, list[Times]] = {name: [] for name in sessions}
    merges: dict[str, list[Times]] = {name: [] for name in sessions}
    for number in range(arguments.rounds):
        for name, (session, num) in sessions.items():
            with timed(reads[name]):
                read(pieces[name], pool, threads)
            with timed(merges[name]):
                session.merge(out=out, **weights_of(name, number + 1, num))
    rows = {}
    for name in sessions:
        num_bytes = sum(t.nbytes for model in inputs[name] for t in model.values())
        once, merge = median(reads[name]), median(merges[name])
        rows[name] = {
            "input_bytes": num_bytes,
            "first_s": first[name],
            "read_s": reads[name],
            "merge_s": merges[name],
            "read_gb_per_s": num_bytes / once.wall / 1e9,
            "ratio": merge.wall / once.wall,
            "cpu_ratio": merge.cpu / once.cpu,
        }
        print(
            f"{name:16} first {first[name]:6.3f} s, again {merge.wall:6.3f} s, one read "
            f"{once.wall:6.3f} s ({num_bytes / once.wall / 1e9:4.1f} GB/s): ratio "
            f"{merge.wall / once.wall:4.2f}, of CPU times {merge.cpu / once.cpu:4.2f}"
        )
        sessions[name][0].close()
    pool.shutdown()
    model_bytes = sum(tensor.nbytes for tensor in models[0].values())
    return {"model_bytes": model_bytes, "experts": arguments.experts, "threads": threads} | {
        "rows": rows
    }


def median(rows: Sequence[Times]) -> Times:
    return Times(*(statistics.median(column) for column in zip(*rows, strict=True)))


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    from pymerge.demo import checkpoint
    from pymerge.demo.data import make_tasks
    from pymerge.demo.experts import trained_models
    from pymerge.demo.model import accuracy, one_thread
    from pymerge.demo.train import Settings, tensors

    settings = Settings()
    tasks = make_tasks(settings.seed)
    folders, _ = trained_models(arguments.models, tasks, settings, print)
    base, *experts = (checkpoint.load(folder) for folder in folders.values())
    live = checkpoint.load(folders["base"])
    parts = {
        part: {task.name: tensors(getattr(task, part)) for task in tasks}
        for part in ("selection", "test")
    }

    def score(part: str) -> float:
        return statistics.fmean(accuracy(live, name, *data) for name, data in parts[part].items())

    rng = np.random.default_rng(arguments.seed)
    found: dict[str, Any] = {"candidates": arguments.candidates}
    with one_thread(), pymerge.Session(base, experts, method="task_arithmetic") as session:
        uniform = np.full(len(experts), 0.3)
        session.merge(uniform, out=live)
        found["uniform"] = {"selection": score("selection"), "test": score("test")}
        best, best_score = uniform, found["uniform"]["selection"]
        merging = 0.0
        start = time.perf_counter()
        for _ in range(arguments.candidates):
            weights = rng.uniform(0.0, 0.8, len(experts))
            before = time.perf_counter()
            session.merge(weights, out=live)
            merging += time.perf_counter() - before
            value = score("selection")
            if value > best_score:
                best, best_score = weights, value
        found["search_s"] = time.perf_counter() - start
        found["merge_ms"] = 1e3 * merging / arguments.candidates
        session.merge(best, out=live)
        found["best"] = {"selection": best_score, "test": score("test"), "weights": best.tolist()}
    for name in ("uniform", "best"):
        each = found[name]
        print(f"{name:8} selection {each['selection']:.4f}   test {each['test']:.4f}")
    print(
        f"{arguments.candidates} candidates in {found['search_s']:.2f} s, "
        f"{found['merge_ms']:.2f} ms of each for the merge"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.1, help="bytes of a model, in GB")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--demo", action="store_true", help="the search instead")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path("demo/models"))
    parser.add_argument("--no-json", action="store_true")
    arguments = parser.parse_args()
    machine = machine_line()
    print(describe(machine))
    what = "search" if arguments.demo else f"{arguments.gb:g}gb"
    found = search(arguments) if arguments.demo else time_merges(arguments)
    if not arguments.no_json:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        path = RESULTS / f"session-{what}-{stamp}.json"
        path.write_text(json.dumps({"machine": machine, **found}, indent=2) + "\n")
        print(path.relative_to(RESULTS.parents[1]))


if __name__ == "__main__":
    main()
