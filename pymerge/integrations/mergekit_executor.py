"""What stands in for mergekit's executor: its planned graph becomes one of our plans.

1. Each tensor to be saved (or returned) is lowered to a draft of a job; the order is that in which
   mergekit's schedule would save them, so that the same tensors share a shard.
2. What is not understood is computed by mergekit's own executor, tensor by tensor, into files
   beside the output; those are copied into it as our jobs.
3. The jobs become a plan, which our engine runs; its files take mergekit's names.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint import Checkpoint
from pymerge.integrations.mergekit_files import STAGING, host_folder, place_files
from pymerge.integrations.mergekit_graph import MERGE, Lowering, find_method
from pymerge.integrations.mergekit_inputs import Inputs, LeftToMergekit, kind_of
from pymerge.integrations.mergekit_left import Made, Output, check_left
from pymerge.integrations.mergekit_run import assemble_jobs, run_reported, seed_of_torch
from pymerge.integrations.mergekit_tally import LOG, TALLY
from pymerge.integrations.mergekit_vocabulary import tokenizer_of
from pymerge.methods.numerics import Numerics
from pymerge.plan.model import Job
from pymerge.recipe.names import MERGEKIT_METHODS

_SAVE = ("mergekit.io.tasks", "SaveTensor")
_FINALIZE = ("mergekit.io.tasks", "FinalizeModel")
_RETURN = ("mergekit.io.tasks", "ReturnTensor")


class Settings(NamedTuple):
    """How lowered merges are run; see :func:`pymerge.integrations.mergekit.redirect`."""

    numerics: Numerics = "accurate"
    memory: int | str | None = None
    threads: int | None = None
    backend: str | None = None


class _Graph(NamedTuple):
    """The targets of an executor by what they are; ``writer`` is None where tensors are
    returned."""

    outputs: list[Output]
    writer: Any
    finalize: Any
    others: list[Any]


class _Drafts(NamedTuple):
    """What is merged by us, ``drafts`` by name, and what mergekit computes: ``left``, the outputs
    by the task that makes them, with the ``reasons``. ``values`` are those of its other tasks."""

    lowering: Lowering
    values: list[tuple[Any, Any]]
    drafts: dict[str, Job]
    left: dict[Any, list[Output]]
    reasons: Counter[str]


def executor_class(host: Any, settings: Settings) -> type[Any]:
    """A class that is used in the place of ``host``, an executor of mergekit's."""

    class Executor(_Executor):
        _host_class = host
        _settings = settings

    return Executor


class _Executor:
    """Runs the tasks of a graph as mergekit's executors do: ``run`` yields each target and its
    value, ``execute`` gives nothing."""

    _host_class: Any
    _settings: Settings

    def __init__(self, targets: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        self._targets = [getattr(each, "task", lambda each=each: each)() for each in targets]
        self._host_targets, self._arguments = targets, (args, kwargs)

    def execute(self, desc: str | None = None) -> None:
        for _ in self.run(desc=desc):
            pass

    def run(self, quiet: bool = False, desc: str | None = None) -> Iterator[tuple[Any, Any]]:
        drafted = None
        try:
            if self._arguments[1].get("cached_values"):
                raise LeftToMergekit("a graph with values that are there already")
            graph = _sort(self._targets)
            drafted = self._draft(graph, self._lowering(graph), quiet)
        except LeftToMergekit as reason:
            TALLY.leave_whole(str(reason))
        # Outside of the handler, so that an error of mergekit's is not shown as one while handling.
        if drafted is None:
            yield from self._host(self._host_targets).run(quiet=quiet, desc=desc)
        else:
            yield from self._run(graph, drafted, quiet)

    def _host(self, targets: Sequence[Any]) -> Any:
        args, kwargs = self._arguments
        return self._host_class(targets, *args, **kwargs)

    def _lowering(self, graph: _Graph) -> Lowering:
        """:raises LeftToMergekit: the graph has no one method of ours."""
        merges = [each.made_by for each in graph.outputs if kind_of(each.made_by) == MERGE]
        names = sorted({task.method_name for task in merges})
        if len(names) != 1:
            found = ", ".join(names) or "no method that is known"
            raise LeftToMergekit(f"expected a merge by one method, found {found}")
        method, numerics = find_method(names[0], self._settings.numerics, MERGEKIT_METHODS)
        if numerics != self._settings.numerics:
            LOG.warning("%s is pymerge's own method and computes in float32 throughout", names[0])
        return Lowering(method, numerics, Inputs(), seed_of_torch(numerics))

    def _draft(self, graph: _Graph, lowering: Lowering, quiet: bool) -> _Drafts:
        """:raises LeftToMergekit: no tensor is one that we lower."""
        drafts: dict[str, Job] = {}
        left: dict[Any, list[Output]] = {}
        reasons: Counter[str] = Counter()
        values = list(self._by_host(graph.others, quiet))
        lowering = lowering._replace(tokenizer=tokenizer_of(values))
        for output in graph.outputs:
            try:
                drafts[output.name] = lowering.draft(output.name, output.made_by, output.dtype)
            except LeftToMergekit as reason:
                reasons[str(reason)] += 1
                left.setdefault(output.made_by, []).append(output)
        check_left(reasons, lowering)
        if not drafts:
            raise LeftToMergekit("; ".join(reasons))
        return _Drafts(lowering, values, drafts, left, reasons)

    def _run(self, graph: _Graph, drafted: _Drafts, quiet: bool) -> Iterator[tuple[Any, Any]]:
        if graph.writer is None:
            with tempfile.TemporaryDirectory(prefix="pymerge-") as place:
                names = self._merge(graph, drafted, Path(place), quiet)
                yield from drafted.values
                yield from _returned(graph, names, Path(place), self._arguments[1])
            return
        out = Path(graph.writer.out_path)
        out.mkdir(parents=True, exist_ok=True)
        self._merge(graph, drafted, out, quiet)
        place_files(out, graph.writer.override_basename or "model")
        yield from drafted.values
        for output in graph.outputs:
            yield output.target, None
        yield graph.finalize, None

    def _merge(self, graph: _Graph, drafted: _Drafts, out: Path, quiet: bool) -> set[str]:
        """Run everything; the tensors then lie in a folder below ``out``.

        :returns: their names.
        """
        lowering, drafts, left = drafted.lowering, dict(drafted.drafts), drafted.left
        TALLY.leave(drafted.reasons)
        beside = host_folder(out)
        try:
            made = Made(beside)
            for task, value in self._by_host(list(left), quiet):
                drafts.update(made.tensors(left[task], value))
            jobs = [drafts[each.name] for each in graph.outputs if each.name in drafts]
            self._run_jobs(jobs, lowering, graph.writer, out, made.checkpoints, quiet)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        TALLY.merges += 1
        TALLY.tensors += len(drafted.drafts)
        return {job.name for job in jobs}

    def _by_host(self, tasks: list[Any], quiet: bool) -> Iterator[tuple[Any, Any]]:
        if tasks:
            yield from self._host(tasks).run(quiet=quiet, desc="Tasks of mergekit's own")

    def _run_jobs(
        self,
        jobs: list[Job],
        lowering: Lowering,
        writer: Any,
        out: Path,
        made: Mapping[str, Checkpoint],
        quiet: bool,
    ) -> None:
        plan = assemble_jobs(
            jobs,
            lowering,
            {**lowering.inputs.checkpoints, **made},
            shard_bytes=max(0, writer.max_shard_size) if writer is not None else 0,
            memory=self._settings.memory,
            threads=self._settings.threads,
            backend=self._settings.backend,
        )
        run_reported(plan, out / STAGING, side_files={}, quiet=quiet)


def _sort(targets: Sequence[Any]) -> _Graph:
    """The targets of a graph, the outputs in the order of mergekit's schedule.

    :raises LeftToMergekit: nothing is merged, or it is written in a way that we do not have.
    """
    from mergekit import graph

    kinds = {kind_of(task) for task in targets}
    asking = _SAVE if _SAVE in kinds else _RETURN
    if asking not in kinds or (asking == _SAVE and _RETURN in kinds):
        raise LeftToMergekit("a graph that merges no tensors")
    others = [task for task in targets if kind_of(task) not in (asking, _FINALIZE)]
    finalize = [task for task in targets if kind_of(task) == _FINALIZE]
    schedule = graph.Executor(list(targets)).schedule
    wanted = set(map(id, targets))
    tasks = [handle.task() for handle in schedule.tasks]
    asked = [task for task in tasks if kind_of(task) == asking]
    if asking == _RETURN:
        outputs = [Output(t, t.weight_info.name, t.tensor_task, t.dtype, False) for t in asked]
        return _Graph(outputs, None, None, others)
    writers = {task.writer_task for task in asked}
    if len(writers) > 1 or len(finalize) != 1 or any(id(task) not in wanted for task in asked):
        raise LeftToMergekit("tensors that are saved elsewhere than in one model")
    writer = writers.pop()
    if not writer.safe_serialization:
        raise LeftToMergekit("PyTorch files as output (--no-safe-serialization)")
    outputs = [Output(t, t.tensor_name, t.tensor_task, t.dtype, t.optional) for t in asked]
    if len({output.name for output in outputs}) < len(outputs):
        raise LeftToMergekit("two tensors of one name")
    return _Graph(outputs, writer, finalize[0], others)


def _returned(
    graph: _Graph, names: set[str], out: Path, arguments: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The tensors of a merge in memory, each read when it is asked for."""
    from safetensors import safe_open

    device = arguments.get("storage_device") or "cpu"
    with safe_open(out / STAGING / "model.safetensors", framework="pt", device="cpu") as file:
        for output in graph.outputs:
            if output.name in names:
                # The file is removed at the end, so that its pages are copied.
                yield output.target, file.get_tensor(output.name).clone().to(device)


__all__ = ["Settings", "executor_class"]
