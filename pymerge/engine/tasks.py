"""The file that describes what stands beside a model."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pymerge.engine.journal import Record
from pymerge.methods.protocol import Beside
from pymerge.plan import Plan


def task_files(plan: Plan, records: Mapping[str, Record]) -> dict[str, bytes]:
    """The files that can only be written once all tensors are: the description, or none.

    :raises PymergeError: what was measured does not give a description.
    """
    if plan.description is None:
        return {}
    tensors = [
        Beside(
            job.tensor(plan.ops),
            records[job.name].values,
            {part.suffix: part.shape for part in job.parts},
        )
        for job in plan.jobs
        if job.parts
    ]
    files = [shard.file_name for shard in plan.task_shards]
    content = plan.description.content(plan.method, plan.tasks, tensors, files)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return {plan.description.file_name: text.encode()}
