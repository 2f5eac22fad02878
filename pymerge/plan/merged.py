"""Merges whose output another merge reads tile by tile, without it ever being written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pymerge.checkpoint import Checkpoint, DerivedTensor, TensorEntry, joined
from pymerge.methods.protocol import Method
from pymerge.plan.model import Job, Plan, job_converts


@dataclass(frozen=True, eq=False)
class MergedTensor(DerivedTensor):
    """What a job of another merge gives, in the format that it would be written in."""

    job: Job
    method: Method

    @property
    def scratch_blocks(self) -> int:
        return self.job.num_inputs

    def fingerprint(self) -> str:
        values = [dict(each) for each in self.job.model_parameters]
        job = self.job
        kind = (job.kind, job.format.name, job.working.name, self.method.spec.name, job.name)
        keys = [entry.key for entry in self.stored]
        base = -1 if job.base is None else keys.index(job.base.key)
        order = [keys.index(entry.key) for entry in job.models]
        models = (values, order, job.model_numbers)
        return json.dumps([kind, dict(job.parameters), models, base], sort_keys=True)


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """The output of a merge that is not written; ``folder`` is where its configuration and its
    tokenizer are from."""


def why_written(plan: Plan) -> str | None:
    """Why the output of a merge must be written before another can read it; None where its tiles
    can be made one by one."""
    method = plan.method
    if method.extras:
        return f"{method.spec.name} writes more than one model"
    if plan.tokenizer_donor is not plan.donor or plan.files:
        return "its tokenizer is not that of its base"
    for job in plan.jobs:
        if job.updates:
            return "an adapter is put on its models"
        if job.granule > 1:
            return f"{method.spec.name} merges whole rows"
        if job.kind == "merge" and (
            plan.model_wide or method.looks(job.tensor(plan.ops)) or job.cost.num_bytes
        ):
            return f"{method.spec.name} measures whole tensors before it merges them"
    return None


def as_checkpoint(plan: Plan, name: str) -> Checkpoint:
    """The output of a merge as a checkpoint called ``name``; :func:`why_written` is None."""
    return MergedCheckpoint(
        reference=name,
        folder=plan.donor.folder,
        headers=plan.headers,
        tensors={
            name: joined(name, _shape(jobs[0]), [_entry(job, plan.method) for job in jobs])
            if jobs[0].piece
            else _entry(jobs[0], plan.method)
            for name, jobs in plan.jobs_of_tensors.items()
        },
        config=None if plan.config is None else dict(plan.config),
        hub_id=None,
        warnings=tuple(f"{name}: {sentence}" for sentence in plan.warnings),
    )


def _entry(job: Job, method: Method) -> TensorEntry:
    source = job.sources[0]
    if job.kind == "copy" and not job_converts(job):
        return replace(source, name=job.name)
    return MergedTensor(
        job.name,
        job.format,
        job.shape,
        source.file,
        source.offset,
        job.num_elements * job.format.num_bytes,
        stored=job.sources,
        nominal=job.format,
        job=job,
        method=method,
    )


def _shape(job: Job) -> tuple[int, ...]:
    """Of the tensor that the job writes a piece of."""
    return job.shape if job.piece is None else (job.piece.count, *job.shape)


def inner_ops(entry: TensorEntry) -> tuple[str, ...]:
    """The ops that making a tensor takes."""
    if not isinstance(entry, DerivedTensor):
        return ()
    own = (*entry.method.ops, "convert") if isinstance(entry, MergedTensor) else ()
    return own + tuple(op for each in entry.stored for op in inner_ops(each))
