"""tasks.json: what the files beside a model hold, and each task's number."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pymerge.checkpoint import TASKS_NAME
from pymerge.engine.journal import Record
from pymerge.methods.task_outputs import FORMULA, TASKS_FORMAT
from pymerge.plan import Plan


def task_files(plan: Plan, records: Mapping[str, Record]) -> dict[str, bytes]:
    """The files that can only be written once all tensors are: tasks.json, or none.

    :raises PymergeError: a task's scale is not finite.
    """
    if not plan.tasks:
        return {}
    jobs = [job for job in plan.jobs if job.parts]
    scales: dict[str, float] = {}
    if plan.method.scales is not None:
        tensors = [job.tensor(plan.ops) for job in jobs]
        scales = plan.method.scales(tensors, [records[job.name].values for job in jobs])
    usual = list(plan.tasks)
    content = {
        "format": TASKS_FORMAT,
        "method": plan.method.spec.name,
        "formula": FORMULA,
        "tasks": [{"name": name, "scale": scales.get(name, 1.0)} for name in usual],
        "files": [shard.file_name for shard in plan.task_shards],
        "rows": {
            job.name: [usual.index(name) for name in job.model_names]
            for job in jobs
            if list(job.model_names) != usual
        },
    }
    return {TASKS_NAME: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()}
