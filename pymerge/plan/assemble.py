"""From drafts of jobs to a plan: places in the output, memory, backends, and the objections that a
method has before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pymerge.checkpoint import Checkpoint, Header, companion_files, skipped_files, update_of
from pymerge.errors import PlanError
from pymerge.methods.layout import unmatched
from pymerge.methods.numerics import Numerics, backend_in
from pymerge.methods.protocol import Method
from pymerge.methods.smile_outputs import SMILE_NAME
from pymerge.methods.task_outputs import TASKS_NAME
from pymerge.ops.opset import OpSet, choose_ops
from pymerge.plan.experts import split_experts
from pymerge.plan.memory import check_devices, cut_memory
from pymerge.plan.merged import inner_ops
from pymerge.plan.model import Job, Plan
from pymerge.plan.placement import place

#: As mergekit: 5 billion bytes a shard.
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Drafted:
    """What is to be merged: the jobs in the output's order, without their places.

    ``config(jobs)`` gives the output's configuration, None where it has none; the jobs that it gets
    have their formats and sizes. ``weights_only`` tells that nothing is to stand beside the
    weights. ``random_seed`` takes the place of the seed that the recipe gives a method with random
    numbers.
    """

    recipe_text: str
    method: Method
    numerics: Numerics
    checkpoints: Mapping[str, Checkpoint]
    donor: Checkpoint
    tokenizer_donor: Checkpoint
    jobs: Sequence[Job]
    config: Callable[[Sequence[Job]], Mapping[str, Any] | None]
    warnings: Sequence[str] = ()
    dropped: tuple[str, ...] = ()
    statistics: Mapping[str, Header] = field(default_factory=dict)
    random_seed: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    weights_only: bool = False


def assemble(
    drafted: Drafted,
    *,
    memory: int,
    threads: int,
    readers: int,
    shard_bytes: int = SHARD_BYTES,
    backend: str | None = None,
    strict: bool = False,
) -> Plan:
    """The plan of drafted jobs.

    :param memory: bytes for the whole process.
    :raises PlanError: the jobs do not fit into the memory, or a header would be too long.
    :raises RecipeError: the parameters of a tensor do not work together.
    """
    method, checkpoints = drafted.method, drafted.checkpoints
    needed = (*method.ops, "convert", "count_nonfinite", *_update_ops(checkpoints.values()))
    ops = choose_ops(dict.fromkeys(needed), asked=backend_in(drafted.numerics, backend))
    warnings = [*drafted.warnings]
    warnings += [sentence for opened in checkpoints.values() for sentence in opened.warnings]
    drafts = split_experts(_seeded(drafted), method, ops, drafted.numerics)
    jobs, shards, num_task_shards = place(drafts, method, ops, shard_bytes)
    check_devices(jobs, set(ops.backends.values()))
    model_wide = any(job.kind == "merge" and method.model_wide(job.tensor(ops)) for job in jobs)
    warnings += _rehearse(method, jobs, ops, model_wide, strict)
    if not drafted.weights_only:
        warnings += _file_warnings(drafted.donor)
    warnings += _beside_warnings(checkpoints.values())
    return Plan(
        recipe_text=drafted.recipe_text,
        method=method,
        checkpoints=checkpoints,
        donor=drafted.donor,
        tokenizer_donor=drafted.tokenizer_donor,
        jobs=jobs,
        shards=shards,
        config=drafted.config(jobs),
        tiling=cut_memory(jobs, memory, threads, readers),
        ops=ops,
        model_wide=model_wide,
        numerics=drafted.numerics,
        warnings=tuple(dict.fromkeys(warnings)),
        dropped=drafted.dropped,
        num_task_shards=num_task_shards,
        statistics=drafted.statistics,
        files=drafted.files,
    )


def _seeded(drafted: Drafted) -> Sequence[Job]:
    """The drafts with the seed that was given for all of them."""
    seed = drafted.random_seed
    if seed is None or "seed" not in drafted.method.spec.parameters:
        return drafted.jobs
    return [
        replace(job, parameters={**job.parameters, "seed": seed}) if job.kind == "merge" else job
        for job in drafted.jobs
    ]


def _update_ops(checkpoints: Iterable[Checkpoint]) -> tuple[str, ...]:
    """The ops that adapters and other merges need when their tensors are read."""
    entries = [entry for opened in checkpoints for entry in opened.tensors.values()]
    inner = tuple(dict.fromkeys(op for entry in entries for op in inner_ops(entry)))
    updates = [update_of(entry) for entry in entries]
    if not any(updates):
        return inner
    if any(update is not None and update.magnitude is not None for update in updates):
        return (*inner, "lora_add", "gram_n", "gram_columns")
    return (*inner, "lora_add")


def _rehearse(
    method: Method, jobs: tuple[Job, ...], ops: OpSet, model_wide: bool, strict: bool
) -> list[str]:
    """Let the method decide what it can without data, so that its objections come before the run.

    :returns: its warnings.
    :raises RecipeError: the parameters of a tensor do not work together.
    :raises PlanError: names that the parameters look for are not there, and ``strict``.
    """
    tensors = [job.tensor(ops) for job in jobs if job.kind == "merge"]
    for tensor in tensors:
        method.merge(tensor)  # a generator does not start before it is asked
    method.check(tensors)
    if model_wide and method.measure_model is not None:
        next(method.measure_model(tensors), None)
    sentences = unmatched(tensors)
    if strict and sentences:
        raise PlanError("; ".join(sentences))
    return sentences + method.warnings(tensors)


def _beside_warnings(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Models that are more than the tensors that are merged of them."""
    return [
        f"{opened.reference} is a base with models beside it, as {name} says; it takes part as the "
        "base alone"
        for opened in checkpoints
        for name in (TASKS_NAME, SMILE_NAME)
        if opened.folder is not None and (opened.folder / name).is_file()
    ]


def _file_warnings(donor: Checkpoint) -> list[str]:
    """What the output takes from the donor unmerged, or leaves out."""
    warnings = []
    if donor.config is None:
        warnings.append(
            f"{donor.reference} has no config.json, so that the output has none and transformers "
            "cannot load it; copy one into the output folder"
        )
    code = [path.name for path in skipped_files(donor)]
    if code:
        warnings.append(
            f"{donor.reference} holds Python files that no configuration names; they are "
            "not copied: "
            f"{', '.join(code[:5])}{', …' if len(code) > 5 else ''}"
        )
    weights = [path for path in companion_files(donor) if path.suffix == ".safetensors"]
    if weights:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in weights)
        warnings.append(f"weights of further modules are copied from {donor.reference}: {names}")
    return warnings
