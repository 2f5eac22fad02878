"""Matrix ops and the methods made of them on layer shapes of Llama, checked and timed on a GPU.

    python bench/matrix_gpu.py                      # shapes of 8B and 70B; one JSON line a case
    python bench/matrix_gpu.py --models 8b --cases polar,iso_c
    python bench/matrix_gpu.py --emulate            # small matrices on the CPU

Needs torch, triton and numpy. For each shape: the Gram matrix by torch and by the Triton kernel,
the polar factor, a truncated SVD, WUDI with Adam and by the spectral filter, TSV-M and Iso-C.
Every case checks a mathematical property first, with its bound, and is timed only where that
holds. Its line has the median of the rounds with the spread, the share of the GEMM rate that
torch.mm reaches on the same device in the same run, the peak of device memory, and the seconds of
the baseline: torch.linalg.svd, or the loop of the method's authors, of which few steps are timed.
``flops`` counts the products that the op's formula has, and 9 c³ for an eigendecomposition.

A baseline that would take longer than ``--patience`` seconds, judged by its time on a smaller
shape, is left out and its line says so. With ``--emulate`` every line says that its numbers are
no measurement; they show that the program works.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

if "--emulate" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from pymerge.ops.workspace import Workspace

Record = dict[str, Any]
Tensors = list[torch.Tensor]

#: Rows and columns of the linear layers.
SHAPES = {
    "8b": [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)],
    "70b": [(1024, 8192), (8192, 8192), (28672, 8192), (8192, 28672)],
    "emulated": [(48, 32), (64, 64), (32, 80)],
}
NUM_TASKS = 4
STEPS, LR, FLOW_TIME = 300, 1e-5, 300.0
#: Steps of Adam that are timed and compared with the loop of the authors.
TIMED_STEPS = 10
ROUNDS, WARM_UP = 3, 1
EMULATED = "emulated on the CPU with small matrices: not a measurement"


def op(name: str, module: str) -> Any:
    return getattr(importlib.import_module(f"pymerge.ops.matrix.{module}"), name)


@dataclass
class Layer:
    """A shape, its task vectors (float32) and the bfloat16 checkpoints that they come from."""

    rows: int
    columns: int
    base: torch.Tensor
    models: Tensors

    @classmethod
    def make(cls, rows: int, columns: int, device: str, seed: int) -> Layer:
        """Fine-tunes with noise and a part of low rank, as trained ones have."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        rank = max(2, min(rows, columns) // 32)
        decay = torch.arange(1, rank + 1, device=device) ** -0.5
        base = (0.02 * normal(rows, columns)).bfloat16()
        models = []
        for _ in range(NUM_TASKS):
            low = (normal(rows, rank) * decay) @ normal(rank, columns)
            tuned = base.float() + 5e-4 * normal(rows, columns) + 5e-4 * low
            models.append(tuned.bfloat16())
        return cls(rows, columns, base, models)

    @property
    def short(self) -> int:
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        return max(self.rows, self.columns)

    @property
    def side(self) -> str:
        return "columns" if self.rows >= self.columns else "rows"

    def task(self, number: int) -> torch.Tensor:
        return self.models[number].float() - self.base.float()

    def tasks(self) -> Tensors:
        return [self.task(number) for number in range(NUM_TASKS)]


@dataclass
class Check:
    """A property's error and what it may be."""

    name: str
    value: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.value <= self.bound


@dataclass
class Case:
    """``run`` is what is timed on what ``prepare`` makes; ``check`` takes both, and ``flops`` what
    it left there. ``scale`` of a baseline says how its time grows, to judge a larger shape by a
    smaller one."""

    name: str
    precision: str
    flops: Callable[[Layer, Any], float]
    prepare: Callable[[Layer], Any]
    run: Callable[[Any, Workspace], Any]
    check: Callable[[Layer, Any, Any, Workspace], list[Check]]
    baseline: Callable[[Any], Any] | None = None
    baseline_name: str = ""
    compare: Callable[[Any, Any], Check] | None = None
    scale: Callable[[Layer], float] = field(default=lambda layer: layer.short**2 * layer.long)
    #: How many times what is timed is done in a merge: the steps of a loop.
    repeats: float = 1.0
    baseline_repeats: float = 1.0
    #: What a merge does once before them.
    before: Callable[[Any, Workspace], Any] | None = None
    #: Whether a difference from the baseline is an error. torch.linalg.svd is no truth on a device:
    #: for large matrices its drivers there are less exact than the ops (pytorch#74521).
    exact_baseline: bool = False


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, by blocks of rows so that no float64 copy is made."""
    error = size = 0.0
    for part in range(0, len(expected), 4096):
        right = expected[part : part + 4096].double()
        error += float((found[part : part + 4096].double() - right).square().sum())
        size += float(right.square().sum())
    return (error / size) ** 0.5 if size else error**0.5


def tall(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[0] >= x.shape[1] else x.T


def inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``leftᵀ right`` in float64, by blocks of rows."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for part in range(0, len(left), 4096):
        total += left[part : part + 4096].double().T @ right[part : part + 4096].double()
    return total


def defect(factor: torch.Tensor) -> float:
    """How far the columns of a tall matrix are from orthonormal, over the root of their number."""
    square = inner(factor, factor)
    square.diagonal().sub_(1)
    return float(square.norm()) / max(1, len(square)) ** 0.5


def check_gram(bound: float) -> Callable[[Layer, Any, Any, Workspace], list[Check]]:
    def check(layer: Layer, x: torch.Tensor, found: torch.Tensor, ws: Workspace) -> list[Check]:
        """Some columns against float64, over the norms of the two vectors of each element."""
        upright = tall(x)
        places = torch.linspace(0, len(found) - 1, 16).long().to(x.device)
        exact = inner(upright, upright[:, places])
        norms = upright.square().sum(0, dtype=torch.float64).sqrt()
        error = (found[:, places].double() - exact).abs() / (norms[:, None] * norms[places])
        skew = float((found - found.T).abs().max())
        return [Check("gram", float(error.max()), bound), Check("symmetry", skew, 0.0)]

    return check


def gram_by(backend: str) -> Callable[[Any, Workspace], torch.Tensor]:
    def run(given: tuple[torch.Tensor, torch.Tensor], ws: Workspace) -> torch.Tensor:
        model, base = given
        size = min(model.shape)
        total = ws.zeros(size, size, dtype="float64")
        side = "columns" if model.shape[0] >= model.shape[1] else "rows"
        op("gram_acc", "gram")(total, model, ws, side=side, base=base, backend=backend)
        return total

    return run


def plain_gram(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    delta = tall(given[0].float() - given[1].float())
    return delta.T @ delta


def check_delta_gram(layer: Layer, given: Any, found: Any, ws: Workspace) -> list[Check]:
    return check_gram(2.0**-23 * 1024**0.5)(layer, given[0].float() - given[1].float(), found, ws)


def check_polar(layer: Layer, x: torch.Tensor, found: Any, ws: Workspace) -> list[Check]:
    """Orthonormal, symmetric with x, and the sum of singular values."""
    factor, upright = tall(found.factor), tall(x)
    square = inner(factor, upright)
    trace, size = float(square.trace()), float(square.norm())
    return [
        Check("orthonormal", defect(factor), 1e-5),
        Check("symmetric", float((square - square.T).norm()) / size, 1e-5),
        Check("nuclear norm", abs(trace - found.nuclear) / trace, 1e-5),
    ]


def rank_of(layer: Layer) -> int:
    return max(1, layer.short // NUM_TASKS)


def check_svd(layer: Layer, x: torch.Tensor, found: Any, ws: Workspace) -> list[Check]:
    """The triplets fit x and each other, and nothing of its energy is lost."""
    left, right = found.left.double(), found.right.double()
    values = found.values.double()
    energy = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    back = inner(x, left).T - values[:, None] * right
    lost = abs(float(values.square().sum()) + float(found.tail) - energy) / energy
    return [
        Check("left", defect(left), 1e-6),
        Check("right", defect(right.T), 1e-6),
        Check("triplets", float(back.norm()) / float(values.norm()), 1e-6),
        Check("energy", lost, 1e-9),
    ]


def svd(x: torch.Tensor) -> Any:
    return torch.linalg.svd(x, full_matrices=False)


def compare_values(found: Any, other: Any) -> Check:
    values = found.values.double()
    error = (values - other[1][: len(values)].double()).abs().max() / values[0]
    return Check("values of torch.linalg.svd", float(error), 1e-5)


def svd_polar(x: torch.Tensor) -> torch.Tensor:
    left, _, right = svd(x)
    return left @ right


def compare_polar(found: Any, other: torch.Tensor) -> Check:
    return Check("U Vᵀ of torch.linalg.svd", relative(found.factor, other), 1e-2)


def wudi_system(tasks: Tensors, ws: Workspace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The start Σ τ, and C and D of the gradient 2 (θ C - D)."""
    size = tasks[0].shape[1]
    start, c, d = torch.zeros_like(tasks[0]), ws.zeros(size, size), torch.zeros_like(tasks[0])
    for task in tasks:
        weight = 1.0 / float(task.square().sum(dtype=torch.float64))
        own = op("gram", "gram")(task, ws, side="columns", dtype="float32")
        start += task
        c.add_(own, alpha=weight)
        d.add_(ws.matmul(task, own), alpha=weight)
    return start, c, d


def wudi_prepared(layer: Layer) -> Record:
    return {"tasks": layer.tasks()}


def wudi_adam(given: Record, ws: Workspace) -> torch.Tensor:
    if "system" not in given:
        given["system"] = wudi_system(given["tasks"], ws)
    start, c, d = given["system"]
    found: torch.Tensor = op("adam_quadratic", "adam")(start, c, d, ws, steps=TIMED_STEPS, lr=LR)
    return found


def wudi_loop(steps: int) -> Callable[[Record], torch.Tensor]:
    def run(given: Record) -> torch.Tensor:
        """The authors' loop: autograd through the products with every task."""
        stack = torch.stack(given["tasks"])
        norms = stack.square().sum((1, 2))
        theta = torch.nn.Parameter(stack.sum(0))
        adam = torch.optim.Adam([theta], lr=LR)
        with torch.enable_grad():
            for _ in range(steps):
                adam.zero_grad()
                product = torch.matmul(theta - stack, stack.transpose(1, 2))
                (product.square() / norms[:, None, None]).sum().backward()
                adam.step()
        return theta.detach()

    return run


def check_wudi_adam(layer: Layer, given: Record, found: Any, ws: Workspace) -> list[Check]:
    """The loss went down, by float64 products with some of the rows."""
    start = given["system"][0]
    rows = torch.linspace(0, layer.rows - 1, 16).long().to(found.device)
    return [Check("loss over its start", loss(given, found, rows) / loss(given, start, rows), 1.0)]


def loss(given: Record, theta: torch.Tensor, rows: torch.Tensor) -> float:
    total = 0.0
    for task in given["tasks"]:
        product = inner((theta[rows] - task[rows]).T, task.T)
        total += float(product.square().sum() / task.square().sum(dtype=torch.float64))
    return total


def compare_iterates(found: torch.Tensor, other: torch.Tensor) -> Check:
    return Check("iterates of the authors' loop", relative(found, other), 1e-5)


def wudi_spectral(given: Record, ws: Workspace) -> torch.Tensor:
    start, c, d = given["system"] = wudi_system(given["tasks"], ws)
    force = d - ws.matmul(start, c)
    filtered: torch.Tensor = op("chebyshev_filter", "chebyshev")(c, force, ws, time=FLOW_TIME)
    return filtered.add_(start)


def check_wudi_spectral(layer: Layer, given: Record, found: Any, ws: Workspace) -> list[Check]:
    """Twice the time in one go is twice the time in two, and the loss went down.

    φ of 2t is φ (2 - C φ) with φ of t.
    """
    start, c, d = given["system"]
    bound = op("largest_eigenvalue", "chebyshev")(c, ws)
    given["degree"] = len(op("expansion", "chebyshev")(FLOW_TIME, bound, torch.finfo(c.dtype).eps))
    rows = torch.linspace(0, layer.rows - 1, 16).long().to(found.device)
    force = d[rows] - start[rows] @ c
    flow = op("chebyshev_filter", "chebyshev")
    once = found[rows] - start[rows]
    twice = 2 * once - flow(c, once @ c, ws, time=FLOW_TIME)
    error = relative(flow(c, force, ws, time=2 * FLOW_TIME), twice)
    ratio = loss(given, found, rows) / loss(given, start, rows)
    return [Check("two times t", error, 1e-3), Check("loss over its start", ratio, 1.0)]


def tsv_m(tasks: Tensors, ws: Workspace) -> Record:
    rank = max(1, min(tasks[0].shape) // len(tasks))
    parts = [op("truncated_svd", "spectrum")(task, rank, ws) for task in tasks]
    left = op("polar", "polar")(torch.cat([part.left for part in parts], 1).float(), ws)
    right = op("polar", "polar")(torch.cat([part.right for part in parts], 0).float(), ws)
    values = torch.cat([part.values for part in parts]).float()
    merged = ws.matmul(left.factor * values, right.factor)
    return {"merged": merged, "left": left.factor, "right": right.factor}


def check_tsv_m(layer: Layer, tasks: Tensors, found: Record, ws: Workspace) -> list[Check]:
    return [
        Check("left", defect(tall(found["left"])), 1e-5),
        Check("right", defect(tall(found["right"])), 1e-5),
    ]


def tsv_m_by_svd(tasks: Tensors) -> torch.Tensor:
    rank = max(1, min(tasks[0].shape) // len(tasks))
    parts = [svd(task) for task in tasks]
    left = svd_polar(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    right = svd_polar(torch.cat([v[:rank] for _, _, v in parts], 0))
    return (left * torch.cat([s[:rank] for _, s, _ in parts])) @ right


def iso_c(tasks: Tensors, ws: Workspace) -> torch.Tensor:
    total = torch.stack(tasks).sum(0)
    found = op("polar", "polar")(total, ws)
    merged: torch.Tensor = found.factor * (found.nuclear / min(total.shape))
    return merged


def check_iso_c(layer: Layer, tasks: Tensors, found: torch.Tensor, ws: Workspace) -> list[Check]:
    """All singular values are one, and that is their mean before."""
    total = torch.stack(tasks).sum(0)
    mean = float(found.norm()) / layer.short**0.5
    trace = float(inner(tall(found), tall(total)).trace()) / mean / layer.short
    return [
        Check("isotropic", defect(tall(found) / mean), 1e-5),
        Check("mean", abs(trace - mean) / mean, 1e-4),
    ]


def iso_c_by_svd(tasks: Tensors) -> torch.Tensor:
    left, values, right = svd(torch.stack(tasks).sum(0))
    return values.mean() * (left @ right)


def compare_merged(found: Any, other: torch.Tensor) -> Check:
    merged = found["merged"] if isinstance(found, dict) else found
    return Check("the authors' formula", relative(merged, other), 1e-2)


def gram_flops(layer: Layer, given: Any = None) -> float:
    """One triangle."""
    return float(layer.short**2 * layer.long)


def polar_flops(layer: Layer, given: Any = None) -> float:
    """By the Gram route: the Gram matrix, its eigenvectors and root, the product with x."""
    return 3 * gram_flops(layer) + 11 * layer.short**3


def svd_flops(layer: Layer, given: Any = None) -> float:
    return gram_flops(layer) * (1 + 2 / NUM_TASKS) + 9 * layer.short**3


def first_pair(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.models[0], layer.base


def first_task(layer: Layer) -> torch.Tensor:
    return layer.task(0)


def wudi_flops(layer: Layer, given: Any = None) -> float:
    """One product with C."""
    return float(2 * layer.rows * layer.columns**2)


def tasks_of(layer: Layer) -> Tensors:
    return layer.tasks()


def cases() -> list[Case]:
    svd_name = "torch.linalg.svd"
    return [
        Case(
            "gram float64",
            "float64",
            gram_flops,
            first_task,
            lambda x, ws: op("gram", "gram")(x, ws, side=side_of(x), dtype="float64"),
            check_gram(1e-13),
        ),
        Case(
            "gram float32",
            "float32",
            gram_flops,
            first_task,
            lambda x, ws: op("gram", "gram")(x, ws, side=side_of(x), dtype="float32"),
            check_gram(2.0**-23 * 1024**0.5),
        ),
        *(
            Case(
                f"gram_acc {backend}",
                precision,
                gram_flops,
                first_pair,
                gram_by(backend),
                check_delta_gram,
                plain_gram,
                "torch.mm of a float32 delta",
            )
            for backend, precision in (("torch", "float64"), ("triton", "float32"))
        ),
        Case(
            "polar",
            "float64",
            polar_flops,
            first_task,
            lambda x, ws: op("polar", "polar")(x, ws),
            check_polar,
            svd_polar,
            svd_name,
            compare_polar,
        ),
        Case(
            "truncated_svd",
            "float64",
            svd_flops,
            first_task,
            lambda x, ws: op("truncated_svd", "spectrum")(x, max(1, min(x.shape) // NUM_TASKS), ws),
            check_svd,
            svd,
            svd_name,
            compare_values,
        ),
        Case(
            "wudi adam",
            "float32",
            lambda layer, given: TIMED_STEPS * wudi_flops(layer),
            wudi_prepared,
            wudi_adam,
            check_wudi_adam,
            wudi_loop(TIMED_STEPS),
            "the authors' loop",
            compare_iterates,
            lambda layer: layer.rows**2 * layer.columns,
            repeats=STEPS / TIMED_STEPS,
            baseline_repeats=STEPS / TIMED_STEPS,
            before=lambda given, ws: wudi_system(given["tasks"], ws),
            exact_baseline=True,
        ),
        Case(
            "wudi spectral",
            "float32",
            lambda layer, given: (1.5 * NUM_TASKS + 1 + given["degree"]) * wudi_flops(layer),
            wudi_prepared,
            wudi_spectral,
            check_wudi_spectral,
            wudi_loop(TIMED_STEPS),
            "the authors' loop",
            None,
            lambda layer: layer.rows**2 * layer.columns,
            baseline_repeats=STEPS / TIMED_STEPS,
        ),
        Case(
            "tsv_m",
            "float64",
            lambda layer, given: (
                NUM_TASKS * svd_flops(layer)
                + polar_flops(layer)
                + 14 * layer.short**3
                + 2 * gram_flops(layer)
            ),
            tasks_of,
            tsv_m,
            check_tsv_m,
            tsv_m_by_svd,
            svd_name,
            compare_merged,
        ),
        Case(
            "iso_c",
            "float64",
            polar_flops,
            tasks_of,
            iso_c,
            check_iso_c,
            iso_c_by_svd,
            svd_name,
            compare_merged,
        ),
    ]


def side_of(x: torch.Tensor) -> str:
    return "columns" if x.shape[0] >= x.shape[1] else "rows"


class Clock:
    """Seconds and peak memory of calls on a device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def once(self, call: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        return result, time.perf_counter() - start

    def rounds(self, call: Callable[[], Any], num: int = ROUNDS) -> list[float]:
        for _ in range(WARM_UP):
            call()
        return sorted(self.once(call)[1] for _ in range(num))

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """What the call gives, and the bytes that it had at most beside what was there before."""
        if not self.on_gpu:
            return call(), None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.wait()
        return result, torch.cuda.max_memory_allocated() - before


def gemm_rates(clock: Clock, device: str, size: int) -> dict[str, float]:
    """GFLOP/s of a square torch.mm in full precision."""
    rates = {}
    for precision in ("float32", "float64"):
        x = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
        seconds = clock.rounds(lambda x=x: torch.mm(x, x))  # type: ignore[misc]
        rates[precision] = 2 * size**3 / statistics.median(seconds) / 1e9
    return rates


class Baselines:
    """Times of baselines, each run once for a shape, and whether the next one is worth waiting."""

    def __init__(self, clock: Clock, patience: float) -> None:
        self._clock = clock
        self._patience = patience
        self._rate: dict[str, float] = {}

    def time(self, case: Case, layer: Layer, given: Any) -> tuple[Any, Record]:
        name, work = case.baseline_name, case.scale(layer)
        key = f"{case.name}: {name}"
        expected = work * self._rate.get(key, 0.0)
        if expected > self._patience:
            return None, {"baseline_skipped": f"{name} would take some {expected:.0f} s"}
        try:
            assert case.baseline is not None
            if key not in self._rate:
                case.baseline(given)  # what is loaded at the first use
            result, seconds = self._clock.once(lambda: case.baseline(given))
            if seconds < 1:
                seconds = statistics.median(self._clock.rounds(lambda: case.baseline(given)))
        except RuntimeError as error:  # most of all, not enough memory
            return None, {"baseline_skipped": f"{name}: {str(error).splitlines()[0]}"}
        self._rate[key] = seconds / work
        return result, {"baseline": name, "baseline_seconds": seconds * case.baseline_repeats}


def figures(
    case: Case, layer: Layer, given: Any, ws: Workspace, clock: Clock, rates: dict[str, float]
) -> Record:
    times = clock.rounds(lambda: case.run(given, ws))
    before = 0.0
    if case.before is not None:
        prepare = case.before
        before = statistics.median(clock.rounds(lambda: prepare(given, ws)))
    median = statistics.median(times)
    rate = case.flops(layer, given) / median / 1e9
    record: Record = {
        "seconds": before + median * case.repeats,
        "seconds_spread": [before + each * case.repeats for each in (times[0], times[-1])],
        "gflops": rate,
        "gemm": case.precision,
        "share_of_gemm": rate / rates[case.precision],
    }
    if case.repeats != 1:
        record["extrapolated"] = f"{TIMED_STEPS} of {STEPS} steps timed"
        record["seconds_before"] = before
    return record


def measured(
    case: Case,
    layer: Layer,
    ws: Workspace,
    clock: Clock,
    rates: dict[str, float],
    baselines: Baselines,
) -> Record:
    """The checks of a case, and its times where they hold."""
    given = case.prepare(layer)
    found, peak = clock.peak(lambda: case.run(given, ws))
    checks = case.check(layer, given, found, ws)
    other, numbers = None, {}
    if case.baseline is not None:
        other, numbers = baselines.time(case, layer, given)
    if other is not None and case.compare is not None:
        compared = case.compare(found, other)
        if case.exact_baseline or not clock.on_gpu:
            checks.append(compared)
        numbers["difference_from_baseline"] = compared.value
    record: Record = {
        "ok": all(each.ok for each in checks),
        "checks": [{"name": c.name, "value": c.value, "bound": c.bound} for c in checks],
    }
    if peak is not None:
        record["peak_bytes"] = peak
        record["peak_matrices"] = peak / (4 * layer.rows * layer.columns)
    if record["ok"]:
        numbers = {**figures(case, layer, given, ws, clock, rates), **numbers}
        if "baseline_seconds" in numbers:
            numbers["times_faster"] = numbers["baseline_seconds"] / numbers["seconds"]
        record |= numbers
    return record


def measure(
    models: Sequence[str], names: Sequence[str], patience: float, emulate: bool
) -> Iterator[Record]:
    """A record for every case and shape, smaller shapes first."""
    device = "cpu" if emulate else "cuda"
    clock = Clock(device)
    baselines = Baselines(clock, patience)
    chosen = [case for case in cases() if not names or case.name in names]
    with Workspace(device=device) as ws, ws.active():
        rates = gemm_rates(clock, device, 128 if emulate else 8192)
        yield marked({"case": "gemm", "ok": True, "gflops_of": rates}, emulate)
        for model in ["emulated"] if emulate else models:
            for number, (rows, columns) in enumerate(SHAPES[model]):
                layer = Layer.make(rows, columns, device, seed=number)
                for case in chosen:
                    record: Record = {"case": case.name, "model": model, "shape": [rows, columns]}
                    try:
                        record |= measured(case, layer, ws, clock, rates, baselines)
                    except Exception as error:  # the other cases are still looked at
                        first = str(error).partition("\n")[0]
                        record |= {"ok": False, "failed": f"{type(error).__name__}: {first}"}
                    yield marked(record, emulate)
                    gc.collect()
                    if device == "cuda":
                        torch.cuda.empty_cache()


def marked(record: Record, emulate: bool) -> Record:
    """An emulation's numbers stand apart from where a measurement's would be."""
    if not emulate:
        return record
    kept = ("case", "model", "shape", "ok", "checks", "failed", "baseline_skipped")
    numbers = {key: value for key, value in record.items() if key not in kept}
    return {
        **{key: record[key] for key in kept if key in record},
        "emulated": EMULATED,
        "not_a_measurement": numbers,
    }


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="8b,70b", help="whose shapes")
    parser.add_argument("--cases", default="", help="names, separated by commas; all by default")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for a baseline")
    parser.add_argument("--emulate", action="store_true", help="small, on the CPU, untimed")
    arguments = parser.parse_args()
    names = [name for name in arguments.cases.split(",") if name]
    known = [case.name for case in cases()]
    if not set(names) <= set(known):
        parser.error(f"--cases: expected names of {', '.join(known)}")
    models = arguments.models.split(",")
    if not set(models) <= set(SHAPES):
        parser.error(f"--models: expected names of {', '.join(SHAPES)}")
    ok = True
    for record in measure(models, names, arguments.patience, arguments.emulate):
        ok &= record["ok"]
        print(json.dumps(record))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
