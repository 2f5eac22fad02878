"""Statistics over a whole model: every tensor is looked at before any is merged."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from pymerge.engine.context import Context
from pymerge.engine.gather import gather
from pymerge.engine.tensor_run import TensorRun
from pymerge.methods.protocol import Folded, Measure, answer


def measure_model(context: Context) -> Any:
    """Drive the method's model-wide measurement; returns the state its tensors receive."""
    method = context.plan.method
    if method.measure_model is None:
        return None
    runs = [
        TensorRun(context, job, may_stay=False) for job in context.plan.jobs if job.kind == "merge"
    ]
    if not runs:
        return {}
    context.events.phase = "measure the whole model"

    def measure(question: Measure) -> Any:
        total = None if question.fold is None else Folded(question.run, question.fold)
        look = question.run if total is None else total.add
        owners: list[str] = []

        def start(run: TensorRun, index: int) -> Future[Any]:
            owners.append(run.job.name)
            context.updates.hold(run.job)
            try:
                future = run.submit_look(index, look)
            except BaseException:
                context.updates.release(run.job)
                raise
            future.add_done_callback(lambda _: context.updates.release(run.job))
            return future

        results = gather(start(run, index) for run in runs for index in range(run.num_tiles))
        if total is not None:
            return total.value
        by_tensor: dict[str, list[Any]] = {run.job.name: [] for run in runs}
        for owner, result in zip(owners, results, strict=True):
            by_tensor[owner].append(result)
        return by_tensor

    state = answer(method.measure_model([run.tensor for run in runs]), measure)
    context.events.phase = "merge"
    return state
