"""Which tensors of a merged model are compared with which tensors of its base and its experts.

A comparison is drafted as jobs whose last model is the output as it was written, so that it is
planned, cut into tiles and read as a merge is: adapters are put on and derived tensors made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from pymerge.checkpoint import Checkpoint, TensorEntry
from pymerge.errors import CheckpointError
from pymerge.plan import Job, Plan
from pymerge.report.figures import OUTPUT


def compare_merge(
    plan: Plan, output: Checkpoint, base_name: str | None, base: Checkpoint | None
) -> list[Job]:
    """Each output tensor with the inputs that the plan of its merge names.

    :param base_name: the recipe's base model, which deltas are taken against even where the method
        takes it as an ordinary input.
    :param base: a base for a recipe without one.
    :raises CheckpointError: the output is not what the plan describes.
    """
    jobs = []
    for job in plan.jobs:
        written = _written(job, output)
        if written is None or written.shape != job.shape:
            found = "none" if written is None else f"one of shape {list(written.shape)}"
            raise CheckpointError(
                f"{output.reference}: expected tensor {job.name!r} of shape {list(job.shape)} by "
                f"its recipe, found {found}; give the recipe that it was merged by with --recipe, "
                "or compare it with --base and --models and --no-recipe"
            )
        if not written.format.is_float:
            jobs.append(_job(written, None, {}))
            continue
        experts = dict(zip(job.model_names, job.models, strict=True))
        own = job.base
        if own is None and base_name in experts:
            own = experts.pop(base_name)
        if own is None and base is not None:
            own = _like(written, base)
        jobs.append(_job(written, own, experts))
    return jobs


def compare_checkpoints(
    output: Checkpoint, base: Checkpoint | None, experts: Mapping[str, Checkpoint]
) -> list[Job]:
    """Each output tensor with those of the same name and shape, as far as there are any."""
    jobs = []
    for written in output.tensors.values():
        if not written.format.is_float:
            jobs.append(_job(written, None, {}))
            continue
        found = {name: _like(written, checkpoint) for name, checkpoint in experts.items()}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        jobs.append(_job(written, None if base is None else _like(written, base), entries))
    return jobs


def _written(job: Job, output: Checkpoint) -> TensorEntry | None:
    """What the job wrote: a tensor, or a part of one along its first dimension."""
    entry = output.tensors.get(job.tensor_name)
    if entry is None or job.piece is None:
        return entry
    if entry.shape != (job.piece.count, *job.shape):
        return entry
    num_bytes = entry.num_bytes // job.piece.count
    offset = entry.offset + job.piece.number * num_bytes
    return replace(entry, name=job.name, shape=job.shape, offset=offset, num_bytes=num_bytes)


def _like(written: TensorEntry, checkpoint: Checkpoint) -> TensorEntry | None:
    entry = checkpoint.tensors.get(written.name)
    fits = entry is not None and entry.format.is_float and entry.shape == written.shape
    return entry if fits else None


def _job(written: TensorEntry, base: TensorEntry | None, experts: Mapping[str, TensorEntry]) -> Job:
    return Job(
        name=written.name,
        kind="merge" if written.format.is_float else "copy",
        shape=written.shape,
        format=written.format,
        base=base,
        models=(*experts.values(), written),
        model_names=(*experts, OUTPUT),
        parameters={},
        model_parameters=({},) * (len(experts) + 1),
        shard=0,
        offset=0,
        num_bytes=0,
        model_numbers=tuple(range(len(experts) + 1)),
    )


def short_names(references: Iterable[str]) -> dict[str, str]:
    """References → the last part of their paths, the whole where two would be alike."""
    names = list(references)
    last = {name: "+".join(Path(part).name or part for part in name.split("+")) for name in names}
    counts = list(last.values())
    return {name: short if counts.count(short) == 1 else name for name, short in last.items()}
