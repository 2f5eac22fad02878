"""Where each job's outputs go: the model's shards, then those of what stands beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pymerge.checkpoint import TASKS_STEM, AdapterTensor, OutputTensor, ShardLayout, plan_shards
from pymerge.formats import F32, FORMATS
from pymerge.methods.protocol import Cost, Method
from pymerge.ops.opset import OpSet
from pymerge.plan.model import Job, Part

BYTE_BITS = 8


class Placed(NamedTuple):
    """Jobs with their places; the last ``num_task_shards`` shards hold the jobs' parts."""

    jobs: tuple[Job, ...]
    shards: tuple[ShardLayout, ...]
    num_task_shards: int


def place(drafts: Sequence[Job], method: Method, ops: OpSet, shard_bytes: int) -> Placed:
    """Give every output of the drafts its place, in their order.

    :raises PlanError: there is nothing to write, or a header would be too long.
    """
    models = plan_shards([_output(d) for d in drafts if not d.is_later_piece], shard_bytes)
    modules = _modules(drafts)
    drafts = [replace(draft, siblings=modules[draft.name.rpartition(".")[0]]) for draft in drafts]
    drafts = [
        replace(draft, parts=tuple(_parts(draft, method, ops)), cost=_cost(draft, method, ops))
        if draft.kind == "merge"
        else draft
        for draft in drafts
    ]
    beside = [
        OutputTensor(part.name, part.format, part.shape) for draft in drafts for part in draft.parts
    ]
    tasks = plan_shards(beside, shard_bytes, TASKS_STEM) if beside else []
    of_models, of_tasks = _places(models, 0), _places(tasks, len(models))
    jobs = []
    for draft in drafts:
        shard, offset, num_bytes = of_models[draft.tensor_name]
        if draft.piece is not None:
            num_bytes //= draft.piece.count
            offset += draft.piece.number * num_bytes
        parts = []
        for part in draft.parts:
            place = of_tasks[part.name]
            parts.append(replace(part, shard=place[0], offset=place[1], num_bytes=place[2]))
        jobs.append(
            replace(
                draft,
                shard=shard,
                offset=offset,
                num_bytes=num_bytes,
                granule=_granule(draft, method, ops),
                parts=tuple(parts),
            )
        )
    return Placed(tuple(jobs), (*models, *tasks), len(tasks))


def _output(draft: Job) -> OutputTensor:
    """The tensor that a draft writes, or its first piece begins."""
    shape = draft.shape if draft.piece is None else (draft.piece.count, *draft.shape)
    return OutputTensor(draft.tensor_name, draft.format, shape)


def _places(shards: Sequence[ShardLayout], first: int) -> dict[str, tuple[int, int, int]]:
    return {
        name: (number, offset, size)
        for number, shard in enumerate(shards, first)
        for name, (offset, size) in shard.tensors.items()
    }


def _cost(draft: Job, method: Method, ops: OpSet) -> Cost:
    cost = Cost() if method.cost is None else method.cost(draft.tensor(ops))
    if not cost.num_bytes:
        return cost
    return cost._replace(num_bytes=cost.num_bytes + _factor_bytes(draft))


def _factor_bytes(draft: Job) -> int:
    """What the factors of adapters take beside the matrices: copies in float32, and in core space
    stacks, bases and their solver's in float64, and a core for each model."""
    models = (entry for entry in draft.models if isinstance(entry, AdapterTensor))
    updates = [entry.update for entry in models if entry.update is not None]
    if not updates:
        return 0
    rows, columns = updates[0].rows, updates[0].columns
    rank = sum(update.rank for update in updates)
    copies = 2 * F32.num_bytes * (rows + columns) * rank
    if rank >= min(rows, columns):
        return copies
    return copies + 8 * (3 * (rows + columns) * rank + len(updates) * rank**2)


def _modules(drafts: Sequence[Job]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each module's tensors by the last parts of their names."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for draft in drafts:
        module, _, last = draft.name.rpartition(".")
        modules.setdefault(module, {})[last] = draft.shape
    return modules


def _parts(draft: Job, method: Method, ops: OpSet) -> Iterator[Part]:
    """The parts of a draft, of the extras that it has."""
    tensor = draft.tensor(ops)
    for extra in method.extras:
        shape = extra.shape_of(tensor)
        if shape is None:
            continue
        rows = 0 if extra.shape else len(draft.models) if extra.per_model else 1
        format = draft.format if extra.bits is None else FORMATS["U8"]
        bits = draft.format.bits if extra.bits is None else extra.bits
        yield Part(f"{draft.name}.{extra.suffix}", format, shape, rows, bits, extra.suffix)


def _granule(draft: Job, method: Method, ops: OpSet) -> int:
    """The method's granule; rows of bits must begin a tile with a byte."""
    if draft.kind != "merge":
        return 1
    granule = method.granule(draft.tensor(ops))
    has_bits = any(part.bits < BYTE_BITS for part in draft.parts)
    return math.lcm(granule, BYTE_BITS) if granule > 1 and has_bits else granule
