"""What is known of the jobs, told of the tensors that they write: one job each, or several."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pymerge import _C
from pymerge.engine.journal import Record
from pymerge.plan import Plan


def checksums(plan: Plan, records: Mapping[str, Record]) -> dict[str, int]:
    """Tensor name -> CRC-32C of its bytes."""
    found = {}
    for name, jobs in plan.jobs_of_tensors.items():
        crc = records[jobs[0].name].crc32c
        for job in jobs[1:]:
            crc = _C.crc32c_combine(crc, records[job.name].crc32c, job.num_bytes)
        found[name] = crc
    return found


def nonfinite(plan: Plan, records: Mapping[str, Record]) -> dict[str, int]:
    """Tensor name -> number of its non-finite elements."""
    return {
        name: sum(records[job.name].nonfinite for job in jobs)
        for name, jobs in plan.jobs_of_tensors.items()
    }


def num_done(plan: Plan, done: Collection[str]) -> int:
    """How many tensors are written by jobs that are done."""
    return sum(all(job.name in done for job in jobs) for jobs in plan.jobs_of_tensors.values())
