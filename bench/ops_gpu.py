"""Every op of a GPU backend on bfloat16 tensors in device memory, against the device's own copy and
plain torch.

``measure(backend, num_elements)`` returns one record per op: median milliseconds by device events,
GB/s of the bytes that the op must move (pymerge.ops.TRAFFIC), its share of the bandwidth of a
device-to-device copy measured in the same run, and for some ops the time of the same formula as a
chain of torch calls and of mergekit's functions where mergekit is installed. Inputs rotate over
sets larger than the cache. An op that fails leaves its error in its record. With ``device="cpu"``
(emulators) only the calls are made: there is nothing to time.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pymerge.formats import BF16, F32
from pymerge.ops.selection import Keep
from pymerge.ops.table import TRAFFIC
from pymerge.ops.view import View

NUM_MODELS = 4
NUM_SETS = 2
COLUMNS = 4096
WARM_UP, ROUNDS = 3, 15
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
DENSITY = 0.2


@dataclass
class Set:
    """A base, its fine-tunes, an output and scratch, on the device."""

    base: torch.Tensor
    models: list[torch.Tensor]
    out: torch.Tensor
    scores: torch.Tensor
    bits: torch.Tensor
    #: Of adam_step: theta, both moments, the gradient.
    state: list[torch.Tensor]

    @classmethod
    def make(cls, num: int, device: str, seed: int) -> Set:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(scale: float) -> torch.Tensor:
            return scale * torch.randn(num, device=device, generator=generator)

        base = normal(0.02)
        models = [(base + normal(1e-3)).bfloat16() for _ in range(NUM_MODELS)]
        out = torch.full_like(models[0], float("nan"))
        bits = torch.randint(
            0,
            256,
            (NUM_MODELS, -(-num // 8)),
            dtype=torch.uint8,
            device=device,
            generator=generator,
        )
        state = [normal(1e-3).abs() for _ in range(4)]
        return cls(base.bfloat16(), models, out, normal(1e-6).abs(), bits, state)


def view(tensor: torch.Tensor) -> View:
    format = F32 if tensor.dtype == torch.float32 else BF16
    assert format.code is not None
    return View(tensor.data_ptr(), format.code, tensor.numel())


@dataclass(frozen=True)
class Case:
    """A call of an op on a set; ``bytes_per_element`` is what it must move."""

    op: str
    title: str
    num_models: int
    bytes_per_element: float
    call: Callable[[Set], Any]
    torch_chain: Callable[[Set], Any] | None = None
    mergekit: Callable[[Set], Any] | None = None


def cases(ops: Any, first: Set) -> list[Case]:
    """The calls on a backend, with thresholds of a density of 20 % taken from one set."""
    num = first.base.numel()
    rows = num // COLUMNS
    n = NUM_MODELS
    keys = [_key(first, model, DENSITY) for model in first.models]
    trims = [Keep(key, num // 2) for key in keys]
    draws = [Keep(draws=int(DENSITY * 2**32), seed=number + 1) for number in range(n)]
    low = np.array([int(key * 0.999) for key in keys], np.int32)
    high = np.array([int(key * 1.001) for key in keys], np.int32)
    factors = np.ones(rows, np.float32)
    grid = np.full((n, rows), 0.25, np.float32)
    rank = np.zeros((rows, 16), np.float32), np.zeros((16, COLUMNS), np.float32)

    def masks(s: Set) -> list[int]:
        return [row.data_ptr() for row in s.bits]

    def models(s: Set) -> list[View]:
        return [view(model) for model in s.models]

    def moved(op: str, base: bool = True, count: int = n, out: int = 2) -> float:
        return TRAFFIC[op](2 if base else 0, 2, count, out)

    def histogram(s: Set) -> None:
        counts = np.zeros((n, 1 << 11), np.uint64)
        ops.magnitude_histogram(view(s.base), models(s), counts, shift=20)

    def trim(s: Set) -> None:
        """Look, count in the bracket, apply: what TIES does with a tensor on the device."""
        ops.magnitude_sample(view(s.base), models(s), 0, group=8, stride=512)
        ops.bracket_count(view(s.base), models(s), low, high, num // 64)
        ops.disjoint_merge(view(s.out), view(s.base), models(s), WEIGHTS, trims, 0)

    def adam(s: Set) -> None:
        state = [view(part) for part in s.state]
        ops.adam_step(*state, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, step=1)

    def mean(s: Set) -> None:
        weights = [view(part) for part in s.state]
        ops.weighted_mean(view(s.out), models(s), weights, WEIGHTS, [1e-6] * n, mode="add")

    look = moved("magnitude_histogram")
    return [
        Case(
            "axpy_n",
            "axpy_n",
            n,
            moved("axpy_n", base=False),
            lambda s: ops.axpy_n(view(s.out), models(s), WEIGHTS),
            _chain_axpy,
        ),
        Case(
            "axpy_n",
            "axpy_n, base",
            n,
            moved("axpy_n"),
            lambda s: ops.axpy_n(view(s.out), models(s), WEIGHTS, base=view(s.base)),
        ),
        Case(
            "axpy_grid",
            "axpy_grid",
            n,
            moved("axpy_grid"),
            lambda s: ops.axpy_grid(
                view(s.out), models(s), grid, columns=COLUMNS, along="rows", base=view(s.base)
            ),
        ),
        Case(
            "magnitude_sample",
            "magnitude_sample, 1 of 512",
            n,
            look / 512,
            lambda s: ops.magnitude_sample(view(s.base), models(s), 0, group=8, stride=512),
        ),
        Case(
            "bracket_count",
            "bracket_count",
            n,
            look,
            lambda s: ops.bracket_count(view(s.base), models(s), low, high, num // 64),
        ),
        Case("magnitude_histogram", "magnitude_histogram", n, look, histogram),
        Case(
            "locate_equal",
            "locate_equal",
            1,
            moved("locate_equal", count=1),
            lambda s: ops.locate_equal(view(s.base), view(s.models[0]), 2**31 - 1, 0),
        ),
        Case(
            "disjoint_merge",
            "disjoint_merge, trim",
            n,
            moved("disjoint_merge"),
            lambda s: ops.disjoint_merge(view(s.out), view(s.base), models(s), WEIGHTS, trims, 0),
            _chain_ties,
        ),
        Case(
            "disjoint_merge",
            "disjoint_merge, dropout",
            n,
            moved("disjoint_merge"),
            lambda s: ops.disjoint_merge(
                view(s.out), view(s.base), models(s), WEIGHTS, draws, 0, combine="sum"
            ),
        ),
        Case("disjoint_merge", "whole trim", n, 2 * look + 2, trim, None, _mergekit_ties),
        Case(
            "count_votes",
            "count_votes",
            n,
            look,
            lambda s: ops.count_votes(view(s.base), models(s), WEIGHTS, trims, 0),
        ),
        Case(
            "kept_sums",
            "kept_sums, dropout",
            n,
            look,
            lambda s: ops.kept_sums(view(s.base), models(s), draws, 0, span=4096),
        ),
        Case("gram_n", "gram_n", n, look, lambda s: ops.gram_n(None, models(s), span=4096)),
        Case(
            "row_sparsify",
            "row_sparsify",
            1,
            moved("row_sparsify", count=1, out=4),
            lambda s: ops.row_sparsify(
                view(s.scores),
                view(s.base),
                view(s.models[0]),
                0,
                columns=COLUMNS,
                draws_low=2**30,
                draws_span=2**31,
                seed=3,
            ),
        ),
        Case(
            "row_divergence",
            "row_divergence",
            1,
            moved("row_divergence", count=1),
            lambda s: ops.row_divergence(view(s.base), view(s.models[0]), columns=COLUMNS),
        ),
        Case(
            "row_scores",
            "row_scores",
            1,
            moved("row_scores", count=1, out=4),
            lambda s: ops.row_scores(
                view(s.scores), view(s.base), view(s.models[0]), factors, columns=COLUMNS
            ),
        ),
        Case(
            "select_by_score",
            "select_by_score",
            1,
            moved("select_by_score", count=1),
            lambda s: ops.select_by_score(
                view(s.out), view(s.base), view(s.models[0]), factors, 1e-3, columns=COLUMNS
            ),
        ),
        Case(
            "lora_add",
            "lora_add, rank 16",
            1,
            moved("lora_add", base=False, count=1, out=4),
            lambda s: ops.lora_add(
                view(s.scores), view(s.models[0]), *rank, 0, columns=COLUMNS, scale=2.0
            ),
        ),
        Case(
            "nearswap",
            "nearswap",
            1,
            moved("nearswap", count=1),
            lambda s: ops.nearswap(view(s.out), view(s.base), view(s.models[0]), t=1e-3),
        ),
        Case(
            "variance_score",
            "variance_score",
            n,
            moved("variance_score", out=4),
            lambda s: ops.variance_score(view(s.scores), view(s.base), models(s)),
        ),
        Case(
            "overlap_counts",
            "overlap_counts",
            n,
            look,
            lambda s: ops.overlap_counts(view(s.base), models(s), epsilon=1e-5),
        ),
        Case(
            "overlap_merge",
            "overlap_merge",
            n,
            moved("overlap_merge"),
            lambda s: ops.overlap_merge(
                view(s.out), view(s.base), models(s), WEIGHTS, epsilon=1e-5
            ),
        ),
        Case(
            "magmax_merge",
            "magmax_merge",
            n,
            moved("magmax_merge"),
            lambda s: ops.magmax_merge(view(s.out), view(s.base), models(s), scale=0.5),
        ),
        Case(
            "consensus_merge",
            "consensus_merge",
            n,
            moved("consensus_merge"),
            lambda s: ops.consensus_merge(
                view(s.out), view(s.base), models(s), [0.4] * n, minimum=2, scale=0.3
            ),
        ),
        Case(
            "tall_masks",
            "tall_masks",
            n,
            look + n / 8,
            lambda s: ops.tall_masks(masks(s), view(s.base), models(s), [0.4] * n),
        ),
        Case(
            "elect_max",
            "elect_max",
            n,
            moved("elect_max"),
            lambda s: ops.elect_max(view(s.out), view(s.base), models(s)),
        ),
        Case(
            "elect_masks",
            "elect_masks",
            n,
            look + n / 8,
            lambda s: ops.elect_masks(masks(s), view(s.base), models(s)),
        ),
        Case(
            "masked_sums",
            "masked_sums",
            n,
            2 + n / 8,
            lambda s: ops.masked_sums(view(s.models[0]), masks(s), span=4096),
        ),
        Case(
            "apply_task",
            "apply_task",
            1,
            6 + 1 / 8,
            lambda s: ops.apply_task(
                view(s.out), view(s.base), view(s.models[0]), masks(s)[0], scale=0.9
            ),
        ),
        Case(
            "pcb_score",
            "pcb_score",
            n,
            moved("pcb_score", out=4),
            lambda s: ops.pcb_score(
                view(s.scores),
                view(s.base),
                models(s),
                0,
                [1e-5] * n,
                [5e-3] * n,
                mode="raw",
                part=1,
            ),
        ),
        Case(
            "pcb_merge",
            "pcb_merge",
            n,
            moved("pcb_merge"),
            lambda s: ops.pcb_merge(
                view(s.out),
                view(s.base),
                models(s),
                [1e-5] * n,
                [5e-3] * n,
                [1e-6] * n,
                [1e-4] * n,
                [1.2] * n,
                mode="raw",
                scale=1.0,
            ),
        ),
        Case("adam_step", "adam_step", 1, TRAFFIC["adam_step"](12, 4, 1, 12), adam),
        Case("weighted_mean", "weighted_mean", n, TRAFFIC["weighted_mean"](0, 6, n, 2), mean),
        Case(
            "convert",
            "convert to float32",
            1,
            6,
            lambda s: ops.convert(view(s.scores), view(s.models[0])),
            lambda s: s.scores.copy_(s.models[0]),
        ),
        Case(
            "count_nonfinite",
            "count_nonfinite",
            1,
            2,
            lambda s: ops.count_nonfinite(view(s.models[0])),
            lambda s: s.models[0].isfinite().logical_not().sum().item(),
        ),
    ]


def _key(s: Set, model: torch.Tensor, density: float) -> int:
    delta = (model.float() - s.base.float()).abs()[: 1 << 20]
    threshold = torch.quantile(delta, 1 - density).item()
    return int(np.float32(threshold).view(np.int32))


def _chain_axpy(s: Set) -> torch.Tensor:
    total = WEIGHTS[0] * s.models[0].float()
    for weight, model in zip(WEIGHTS[1:], s.models[1:], strict=True):
        total = total + weight * model.float()
    return total.bfloat16()


def _chain_ties(s: Set) -> torch.Tensor:
    base = s.base.float()
    votes = []
    for weight, model in zip(WEIGHTS, s.models, strict=True):
        delta = model.float() - base
        votes.append(torch.where(delta.abs() > 1.28e-3, weight * delta, 0.0))
    stack = torch.stack(votes)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    chosen = stack.sign() == sign
    weights = torch.tensor(WEIGHTS, device=base.device)[:, None]
    den = (weights * chosen).sum(0)
    merged = (stack * chosen).sum(0) / torch.where(den == 0, 1.0, den)
    return (base + merged).bfloat16()


def _mergekit_ties(s: Set) -> torch.Tensor:
    sparsify = importlib.import_module("mergekit.sparsify")
    election = importlib.import_module("mergekit.merge_methods.generalized_task_arithmetic")
    deltas = [
        sparsify.sparsify(
            model - s.base, density=DENSITY, method=sparsify.SparsificationMethod.magnitude
        )
        for model in s.models
    ]
    stack = torch.stack(deltas)
    weights = torch.tensor(WEIGHTS, dtype=stack.dtype, device=stack.device)[:, None]
    stack = stack * weights
    mask = election.get_mask(stack, method="sum", mask_dtype=stack.dtype)
    den = (weights * mask).sum(0)
    den[den == 0] = 1
    result: torch.Tensor = s.base + (stack * mask).sum(0) / den
    return result


def milliseconds(call: Callable[[Set], Any], sets: Sequence[Set]) -> list[float]:
    """Device time of each round, by events on the current stream."""
    for number in range(WARM_UP):
        call(sets[number % len(sets)])
    torch.cuda.synchronize()
    found = []
    for number in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(sets[number % len(sets)])
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)


def copy_rate(sets: Sequence[Set]) -> float:
    """GB/s, read plus written, of a device-to-device copy."""
    times = milliseconds(lambda s: s.out.copy_(s.base), sets)
    num_bytes = 2 * sets[0].base.numel() * 2
    return num_bytes / statistics.median(times) / 1e6


def measure(backend: str, num_elements: int, device: str = "cuda") -> list[dict[str, Any]]:
    """A record for every op of the backend; with ``device="cpu"`` nothing is timed."""
    ops = importlib.import_module(f"pymerge.ops.{backend}")
    num_elements -= num_elements % COLUMNS
    sets = [Set.make(num_elements, device, seed) for seed in range(NUM_SETS)]
    copy = copy_rate(sets) if device == "cuda" else None
    records = []
    for case in cases(ops, sets[0]):
        record: dict[str, Any] = {
            "backend": backend,
            "op": case.op,
            "case": case.title,
            "num_models": case.num_models,
            "num_elements": num_elements,
        }
        problem = ops.why_not(case.op)
        if problem is not None:
            records.append({**record, "skipped": problem})
            continue
        try:
            if copy is None:
                case.call(sets[0])
                records.append({**record, "called": True})
                continue
            times = milliseconds(case.call, sets)
        except Exception as error:  # whatever one op does, the others are still looked at
            records.append({**record, "failed": f"{type(error).__name__}: {error}"})
            continue
        median = statistics.median(times)
        rate = case.bytes_per_element * num_elements / median / 1e6
        record |= {
            "ms": median,
            "ms_spread": [times[0], times[-1]],
            "gb_per_s": rate,
            "copy_gb_per_s": copy,
            "share_of_copy": rate / copy,
        }
        for name, chain in (("torch", case.torch_chain), ("mergekit", case.mergekit)):
            if chain is None:
                continue
            try:
                other = statistics.median(milliseconds(chain, sets))
            except Exception as error:  # what we compare with is not ours to keep running
                record[f"{name}_skipped"] = f"{type(error).__name__}: {error}"
            else:
                record |= {f"{name}_ms": other, f"times_faster_than_{name}": other / median}
        records.append(record)
    return records
