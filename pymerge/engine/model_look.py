"""Statistics over a whole model: every tensor is looked at before any is merged."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pymerge.engine.context import NUM_LANES, Context
from pymerge.engine.gather import gather
from pymerge.engine.tensor_run import TensorRun
from pymerge.methods.protocol import EachTensor, Folded, Measure, answer
from pymerge.plan import Job


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

    def measure(question: Measure | EachTensor) -> Any:
        if isinstance(question, EachTensor):
            return explore_each(context, question)
        total = None if question.fold is None else Folded(question.run, question.fold)
        look = question.run if total is None else total.add
        owners: list[str] = []

        def start(run: TensorRun, index: int) -> Future[Any]:
            owners.append(run.job.name)
            context.updates.hold(run.job)
            try:
                future = run.submit_look(index, look, question.models)
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


def explore_each(context: Context, question: EachTensor) -> dict[str, Any]:
    """Ask about every tensor by itself, a few at once."""
    jobs = [job for job in context.plan.jobs if job.kind == "merge"]

    def explore(job: Job) -> Any:
        try:
            return TensorRun(context, job, may_stay=False).explore(question.run)
        except BaseException:
            context.stop()
            raise

    with ThreadPoolExecutor(NUM_LANES, thread_name_prefix="pymerge-explore") as lanes:
        found = gather(lanes.submit(explore, job) for job in jobs)
    return dict(zip((job.name for job in jobs), found, strict=True))
