"""How fast this machine computes with matrices, for the prediction of a plan's time.

Measured once by products and an eigenproblem of the kind that the methods ask for, and kept in the
user's cache for a week; ``pymerge plan`` and ``pymerge doctor`` measure, a merge does not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pymerge.cache import cache_folder
from pymerge.engine.rates import KEEP_SECONDS
from pymerge.ops import device
from pymerge.ops.workspace import Workspace
from pymerge.plan import Plan

#: Size of the products and of the eigenproblem on the host, and on a device.
SIZE, DEVICE_SIZE = 1024, 4096


@dataclass(frozen=True)
class MatrixRates:
    """Operations a second: products in float32 and float64 with all threads, and an eigenproblem of
    float64, counted as 9 n³, with one."""

    flops32: float
    flops64: float
    eigen64: float


def matrix_seconds(plan: Plan, rates: MatrixRates) -> float:
    """Seconds that the matrices of a plan take at these rates, on all of its devices."""
    costs = [job.cost for job in plan.jobs]
    seconds = sum(
        cost.flops32 / rates.flops32 + cost.flops64 / rates.flops64 + cost.eigen64 / rates.eigen64
        for cost in costs
    )
    return seconds / max(1, len(_devices(plan)))


def matrix_rates_of(plan: Plan) -> MatrixRates | None:
    """The rates where this plan computes, measured if they are not known; None for a plan without
    matrices."""
    if not any(job.cost.num_bytes for job in plan.jobs):
        return None
    places = _devices(plan)
    name, torch_name = places[0] if places else ("cpu", "cpu")
    threads = 1 if places else plan.tiling.threads
    path = cache_folder() / "rates" / f"matrix-{_plain(name)}-{threads}.json"
    known = _known(path)
    if known is None:
        known = measure_matrix_rates(threads, torch_name)
        _remember(path, known)
    return known


def measure_matrix_rates(threads: int, torch_name: str = "cpu") -> MatrixRates:
    """Measure: less than a second on the host."""
    import torch

    with Workspace(threads, torch_name) as ws, ws.active():
        size = SIZE if ws.on_host else DEVICE_SIZE

        def finish(run: Callable[[], object]) -> None:
            run()
            if not ws.on_host:
                torch.cuda.synchronize(ws.device)

        def rate(run: Callable[[], object], flops: float) -> float:
            finish(run)
            begin = time.perf_counter()
            finish(run)
            return flops / (time.perf_counter() - begin)

        generator = torch.Generator().manual_seed(0)
        single = torch.randn(size, size, generator=generator).to(ws.device)
        double = single.double()
        gram = double @ double.T
        product = 2.0 * size**3
        return MatrixRates(
            rate(lambda: ws.matmul(single, single), product),
            rate(lambda: ws.matmul(double, double), product),
            rate(lambda: torch.linalg.eigh(gram), 9.0 * size**3),
        )


def _devices(plan: Plan) -> list[tuple[str, str]]:
    """(name, torch's name) of the devices that the plan's ops work on; none for the host."""
    for backend in sorted(set(plan.ops.backends.values())):
        if device.memory_of(backend) == "device":
            found = [(each.name, each.torch_name) for each in device.devices_for(backend)]
            return [place for place in found if place[1] != "cpu"]
    return []


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _known(path: Path) -> MatrixRates | None:
    try:
        entry = json.loads(path.read_text())
        if time.time() - entry["measured_at"] > KEEP_SECONDS:
            return None
        return MatrixRates(**entry["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, rates: MatrixRates) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"measured_at": time.time(), "rates": asdict(rates)}))
        os.replace(temporary, path)
    except OSError:
        return  # a home that cannot be written costs only the memory of this measurement
