"""Run a plan: a few lanes take jobs in order, tasks stream their tiles, the output commits at the
end."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from pymerge.engine import pieces
from pymerge.engine.batch import Batch
from pymerge.engine.blocks import Stopped
from pymerge.engine.context import GROUP, NUM_LANES, Context
from pymerge.engine.events import Events, Snapshot
from pymerge.engine.finish import finished_manifest, make_manifest
from pymerge.engine.model_look import measure_model
from pymerge.engine.open_files import room_for_files
from pymerge.engine.output import Output
from pymerge.engine.sources import Sources
from pymerge.engine.tasks import task_files
from pymerge.engine.tensor_run import TensorRun
from pymerge.errors import InterruptedMerge, PymergeError
from pymerge.plan import Job, Plan
from pymerge.sizes import counted

#: Files that a merge opens beside its sources and shards: journal, trace, side files, probes.
OTHER_FILES = 32
NonFinite = Literal["warn", "fail"]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    ``stage_seconds`` sums the time of all threads in each stage; ``floor_fraction`` is the time
    that the storage alone needs by the rates remembered for this machine, over the time taken; it
    exceeds 1 where the storage was faster than when it was measured, and is None where it was not
    measured; ``peak_memory`` is the peak resident size of the process in bytes.
    ``warnings`` are sentences for the user: the plan's, then the method's about tensors, each with
    the name before it. ``done_before`` says that the folder held this very output already, so that
    nothing was done.
    """

    out: Path
    method: str
    num_tensors: int
    num_resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    stage_seconds: Mapping[str, float]
    floor_fraction: float | None
    peak_memory: int
    nonfinite: Mapping[str, int]
    backends: Mapping[str, str]
    read_methods: Mapping[str, str]
    warnings: tuple[str, ...] = field(default=())
    done_before: bool = False


def run_plan(
    plan: Plan,
    out: Path,
    *,
    side_files: Mapping[str, bytes],
    overwrite: bool = False,
    nonfinite: NonFinite = "warn",
    sync: bool = True,
    drop_cache: bool = False,
    read_method: str | None = None,
    floor_seconds: float | None = None,
    trace: Path | None = None,
    progress: Callable[[Snapshot], None] | None = None,
    resume_hint: str = "run the same merge again",
) -> MergeReport:
    """Merge according to ``plan`` into the folder ``out``.

    A folder that holds the finished output of this very plan is left as it is.

    :raises StorageError: reading or writing failed; what is done stays resumable.
    :raises InterruptedMerge: SIGINT or SIGTERM came; what is done stays resumable.
    :raises PymergeError: a tensor has non-finite elements and ``nonfinite`` is ``fail``.
    """
    events = Events(trace=trace is not None)
    before = None if overwrite else finished_manifest(plan, out, side_files)
    if before is not None:
        found = before.content["nonfinite"]
        _check_finite(found, nonfinite)
        everything = frozenset(job.name for job in plan.jobs)
        return replace(_report(plan, out, events, everything, found, {}, None), done_before=True)
    if trace is not None:
        events.write_trace(trace)  # a place that cannot be written is better found now
    interrupted = threading.Event()
    with room_for_files(_num_files(plan)), _signals(interrupted):
        output = Output(plan, out, overwrite=overwrite, sync=sync, drop_cache=drop_cache)
        try:
            sources = Sources(plan.headers, read_method)
            context = Context(plan, sources, output, events)
            try:
                _run_lanes(context, interrupted, progress)
                sources.check_unchanged()
            finally:
                context.close()
            counts = pieces.nonfinite(plan, output.records)
            found = {name: count for name, count in sorted(counts.items()) if count}
            _check_finite(found, nonfinite)
            warnings = [
                f"{name}: {sentence}"
                for name, record in sorted(output.records.items())
                for sentence in record.warnings
            ]
            output.complete_resumed()
            files = {**side_files, **task_files(plan, output.records)}
            output.commit(files, make_manifest(plan, output.records, files))
        except InterruptedMerge as stop:
            output.make_durable()
            raise InterruptedMerge(
                f"{stop}: {pieces.num_done(plan, output.records)} of {plan.num_tensors} tensors "
                "are written; "
                f"to continue, {resume_hint}"
            ) from None
        finally:
            output.close()
            if trace is not None:
                events.write_trace(trace)
    report = _report(plan, out, events, output.resumed, found, sources.methods, floor_seconds)
    return replace(report, warnings=(*report.warnings, *warnings))


def _report(
    plan: Plan,
    out: Path,
    events: Events,
    resumed: frozenset[str],
    nonfinite: Mapping[str, int],
    read_methods: Mapping[str, str],
    floor_seconds: float | None,
) -> MergeReport:
    seconds = events.elapsed
    return MergeReport(
        out=out,
        method=plan.method.spec.name,
        num_tensors=plan.num_tensors,
        num_resumed=pieces.num_done(plan, resumed),
        bytes_read=events.bytes["read"],
        bytes_written=events.bytes["write"],
        seconds=seconds,
        stage_seconds=dict(events.seconds),
        floor_fraction=None if floor_seconds is None else floor_seconds / seconds,
        peak_memory=_peak_memory(),
        nonfinite=nonfinite,
        backends=plan.ops.backends,
        read_methods=read_methods,
        warnings=plan.warnings,
    )


def _num_files(plan: Plan) -> int:
    """How many files the merge may have open at once: every source and every shard is one."""
    return len(plan.headers) + len(plan.shards) + OTHER_FILES


def _peak_memory() -> int:
    """Peak resident bytes of this program.

    ``ru_maxrss`` would count what the process that started us had in memory at that moment.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run_lanes(
    context: Context,
    interrupted: threading.Event,
    progress: Callable[[Snapshot], None] | None,
) -> None:
    plan, output = context.plan, context.output
    todo = [job for job in plan.jobs if job.name not in output.records]
    for _ in range(pieces.num_done(plan, output.records)):
        context.events.tensor_done()
    failures: list[BaseException] = []
    state: list[object] = [None]
    groups = iter(_groups(context, todo))
    lock, small = threading.Lock(), threading.Lock()
    batch = Batch(output, context.events)

    def lane() -> None:
        try:
            while not context.stopping:
                with lock:
                    group = next(groups, None)
                if group is None:
                    return
                if not context.is_small(group[0]):
                    TensorRun(context, group[0], state=state[0]).run()
                    continue
                with small, batch.flushed():
                    for job in group:
                        if context.stopping:
                            break
                        TensorRun(context, job, state=state[0], batch=batch).run()
        except Stopped:
            return
        except BaseException as error:
            failures.append(error)
            context.stop()

    def everything() -> None:
        try:
            if plan.model_wide and todo:
                state[0] = measure_model(context)
        except Stopped:
            return
        except BaseException as error:
            failures.append(error)
            context.stop()
            return
        lanes = [threading.Thread(target=lane, name=f"pymerge-lane-{i}") for i in range(NUM_LANES)]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()

    # The main thread only waits, so that signals and the progress display are served at once.
    runner = threading.Thread(target=everything, name="pymerge-run")
    runner.start()
    shown = time.monotonic()
    totals = (_bytes_to_read(context), sum(job.output_bytes for job in todo), plan.num_tensors)
    try:
        while runner.is_alive():
            runner.join(0.05)
            if interrupted.is_set():
                context.stop()
            if progress is not None and time.monotonic() - shown >= 0.1:
                shown = time.monotonic()
                progress(context.events.snapshot(*totals))
    except BaseException:  # KeyboardInterrupt where no handler could be set, or a failing display
        context.stop()
        runner.join()
        raise
    if progress is not None:
        progress(context.events.snapshot(*totals))
    if failures:
        raise failures[0]
    if interrupted.is_set():
        raise InterruptedMerge("interrupted")


def _groups(context: Context, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The jobs in order, small ones that follow each other together."""
    group: list[Job] = []
    for job in jobs:
        is_small = context.is_small(job)
        if group and (not is_small or len(group) == GROUP):
            yield group
            group = []
        if is_small:
            group.append(job)
        else:
            yield [job]
    if group:
        yield group


def _bytes_to_read(context: Context) -> int:
    """What this run will read: tensors that were done before take part in model-wide looks only."""
    plan, done = context.plan, context.output.resumed
    if len(done) == len(plan.jobs):
        return 0
    total = 0
    for job in plan.jobs:
        passes = plan.looks[job.name]
        if job.name in done:
            passes = passes - 1 if plan.model_wide else 0
        total += round(job.source_bytes * passes) + (job.once_bytes if passes else 0)
    return total


def _check_finite(found: Mapping[str, int], policy: NonFinite) -> None:
    """:raises PymergeError: there are non-finite elements and the policy is ``fail``."""
    if not found or policy != "fail":
        return
    names = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:5])
    raise PymergeError(
        f"{counted(len(found), 'tensor')} of the result have non-finite elements: {names}"
        f"{', …' if len(found) > 5 else ''}. Look for them in the inputs with "
        "`pymerge inspect --check`, or accept them with --non-finite warn: the same command then "
        "finishes what is there"
    )


@contextmanager
def _signals(interrupted: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to stop, a second one ends the process at once, which costs no
    more than a kill does; only the main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(number, signal.SIG_DFL)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
