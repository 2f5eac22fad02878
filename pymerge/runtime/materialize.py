"""One task's model as a checkpoint of its own: a merge of the base, the vector and a mask.

It is planned and run like any other merge: streamed within a memory budget, resumable, whole or not
a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from pymerge import api
from pymerge.checkpoint import TensorEntry
from pymerge.errors import PymergeError
from pymerge.machine import compute_threads
from pymerge.methods.protocol import Apply, Method, Tensor
from pymerge.methods.spec import MethodSpec
from pymerge.ops.opset import choose_ops
from pymerge.plan import SHARD_BYTES, Job, Plan
from pymerge.plan.memory import cut_memory
from pymerge.plan.placement import place
from pymerge.runtime.task_folder import Task, TaskFolder, open_tasks
from pymerge.sizes import parse_size

if TYPE_CHECKING:
    from pymerge.engine import MergeReport, Snapshot
    from pymerge.engine.run import NonFinite


def materialize(
    out: str | os.PathLike[str],
    task: str | int,
    dest: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str | None = None,
    backend: str | None = None,
    overwrite: bool = False,
    non_finite: NonFinite = "warn",
    sync: bool = True,
    cache_output: bool = False,
    progress: Callable[[Snapshot], None] | None = None,
    resume_hint: str = "materialize the task again",
) -> MergeReport:
    """Write the model of one task of a merge by emr or tall_masks as a checkpoint at ``dest``.

    It has the base's names, shapes, formats, configuration and tokenizer. Like a merge it is whole
    or is not a model, and continues where it was stopped.

    :param out: the merged folder.
    :param task: the task's name, that is its model in the recipe, its number from 0, or a part of
        its name that fits no other.
    :param dest: output folder.

    The other parameters, and what else is raised, are those of :func:`pymerge.merge`.

    :raises CheckpointError: ``out`` is no such merge or is damaged.
    :raises PymergeError: there is no such task; the message names those there are.
    """
    planned = plan_task(
        out, task, memory=memory, threads=threads, shard_size=shard_size, backend=backend
    )
    return api.merge(
        planned,
        dest,
        overwrite=overwrite,
        non_finite=non_finite,
        sync=sync,
        cache_output=cache_output,
        progress=progress,
        resume_hint=resume_hint,
    )


def plan_task(
    out: str | os.PathLike[str],
    task: str | int,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str | None = None,
    backend: str | None = None,
) -> Plan:
    """The plan of :func:`materialize`; only headers are read."""
    folder = open_tasks(os.fspath(out))
    chosen = folder.find(task)
    method = _method(folder, chosen)
    ops = choose_ops((*method.ops, "convert", "count_nonfinite"), asked=backend)
    shard_bytes = SHARD_BYTES if shard_size is None else parse_size(shard_size, "shard size")
    if shard_bytes < 1:
        raise PymergeError(f"shard size: expected at least 1 byte, found {shard_bytes}")
    checkpoint = folder.checkpoint
    drafts = [_draft(folder, chosen, entry) for entry in checkpoint.tensors.values()]
    placed = place(drafts, method, ops, shard_bytes)
    budget = api.default_memory() if memory is None else parse_size(memory, "memory")
    tiling = cut_memory(placed.jobs, budget, compute_threads(threads), api.READERS)
    return Plan(
        recipe_text=_recipe(checkpoint.reference, chosen),
        method=method,
        checkpoints={checkpoint.reference: checkpoint},
        donor=checkpoint,
        tokenizer_donor=checkpoint,
        jobs=placed.jobs,
        shards=placed.shards,
        config=checkpoint.config,
        tiling=tiling,
        ops=ops,
        model_wide=False,
    )


def _method(folder: TaskFolder, task: Task) -> Method:
    """Base, vector and mask to a task's tensor."""

    def merge(tensor: Tensor) -> Apply:
        return Apply(
            lambda tile, out: tensor.ops.apply_task(
                out, tile.base, tile.models[0], tile.models[1].ptr, scale=task.scale
            )
        )

    spec = MethodSpec(
        name=folder.method,
        summary=f"The model of one task, {PurePath(task.name).name}, out of a merge that has one "
        "for each.",
        paper="",
        base="input",
        min_models=1,
        max_models=1,
    )
    return Method(spec, merge, ("apply_task",))


def _draft(folder: TaskFolder, task: Task, entry: TensorEntry) -> Job:
    delta = folder.delta(entry.name, task)
    values: dict[str, Any] = {"scale": task.scale}
    return Job(
        name=entry.name,
        kind="copy" if delta is None else "merge",
        shape=entry.shape,
        format=entry.format,
        base=None if delta is None else entry,
        models=(entry,) if delta is None else tuple(delta),
        model_names=(folder.checkpoint.reference,) if delta is None else ("vector", "mask"),
        parameters={} if delta is None else values,
        model_parameters=(),
        shard=0,
        offset=0,
        num_bytes=0,
    )


def _recipe(reference: str, task: Task) -> str:
    """What the card and the manifest say; not a recipe for a merge."""
    return f"materialize: {json.dumps(reference)}\ntask: {json.dumps(task.name)}\n"
