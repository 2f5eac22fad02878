"""Measure a merged model against its base and its experts, tile by tile within the memory.

Deltas are float32, products and their sums float64: span sums that do not depend on the tiles,
added without rounding. Everything else is counted. So the figures are the same whatever the
threads and the memory. docs/report.md defines them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import Checkpoint
from pymerge.engine.blocks import Stopped
from pymerge.engine.context import NUM_LANES, Context
from pymerge.engine.events import Events, Snapshot
from pymerge.engine.open_files import room_for_files
from pymerge.engine.output import Output
from pymerge.engine.sources import Sources
from pymerge.engine.tensor_run import TensorRun
from pymerge.errors import InterruptedMerge
from pymerge.formats import BY_CODE, F32, Format
from pymerge.methods.gram import exact_sum, square
from pymerge.methods.protocol import SPAN, Apply, Measure, Method, Tensor, Tile
from pymerge.methods.spec import MethodSpec
from pymerge.ops.opset import OpSet
from pymerge.ops.view import View, view
from pymerge.plan import Drafted, Job, Part, Plan, assemble
from pymerge.report.figures import Figures, Product

#: Elements that are compared at once: their float32 copies stay in a core's cache.
PIECE = 1 << 14
#: Seconds between two looks at the progress.
POLL = 0.1
#: Files beside the sources.
OTHER_FILES = 8

Floats = NDArray[np.float32]


class Counts(NamedTuple):
    """What is counted of a run of elements."""

    nonfinite: int
    inputs_nonfinite: int
    changed: int
    conflicts: int


class Look(NamedTuple):
    """What a tile gives: span sums of products, of deltas and of the output with the base."""

    deltas: NDArray[np.float64]
    weights: NDArray[np.float64]
    counts: Counts


def _as_written(tensor: Tensor) -> Apply:
    return Apply(lambda tile, out: tensor.ops.convert(out, tile.models[-1]))


#: A survey is planned as a merge that gives the output as it is; its tiles are only looked at.
SURVEY = Method(
    spec=MethodSpec("survey", "The last model.", "", "optional", 1, None),
    merge=_as_written,
    ops=("gram_n", "axpy_n", "convert", "count_nonfinite"),
)


def plan_survey(
    jobs: Sequence[Job],
    checkpoints: Mapping[str, Checkpoint],
    output: Checkpoint,
    *,
    memory: int,
    threads: int,
    readers: int,
) -> Plan:
    """The plan of a survey. It runs on the CPU: the rest of it are counts in numpy.

    :raises PlanError: it does not fit into the memory.
    :raises BackendError: the CPU backend cannot run here.
    """
    # The output may be stored under the name of one of its inputs.
    named = {**checkpoints, f"{output.reference} (the output)": output}
    drafted = Drafted(
        recipe_text="",
        method=SURVEY,
        numerics="accurate",
        checkpoints=named,
        donor=output,
        tokenizer_donor=output,
        jobs=jobs,
        config=lambda _: None,
    )
    return assemble(drafted, memory=memory, threads=threads, readers=readers, backend="cpu")


class Nowhere(Output):
    """The output of a run that writes nothing."""

    def __init__(self) -> None:
        self.records = {}

    def write(self, job: Job | Part, offset: int, address: int, num_bytes: int) -> None:
        raise RuntimeError(f"{job.name}: a survey writes nothing")


def run_survey(
    plan: Plan, progress: Callable[[Snapshot], None] | None = None
) -> dict[str, Figures | None]:
    """Output tensor → its figures, None where it is not floating point.

    :raises StorageError: a file cannot be read, or changed while it was.
    :raises InterruptedMerge: the user stopped it.
    """
    events = Events()
    events.phase = "survey"
    with room_for_files(len(plan.headers) + OTHER_FILES):
        sources = Sources(plan.headers)
        context = Context(plan, sources, Nowhere(), events)
        try:
            found = _measure(context, progress)
            sources.check_unchanged()
        finally:
            context.close()
    return {job.name: found.get(job.name) for job in plan.jobs}


def _measure(context: Context, progress: Callable[[Snapshot], None] | None) -> dict[str, Figures]:
    """Every tensor, a few at once."""
    jobs = [job for job in context.plan.jobs if job.kind == "merge"]
    total = sum(job.source_bytes + job.once_bytes for job in jobs)

    def measure(job: Job) -> Figures:
        try:
            run = TensorRun(context, job, may_stay=False)
            figures: Figures = run.explore(lambda tensor: _questions(tensor, job))
        except BaseException:
            context.stop()
            raise
        context.events.tensor_done()
        return figures

    lanes = ThreadPoolExecutor(NUM_LANES, thread_name_prefix="pymerge-survey")
    started: dict[str, Future[Figures]] = {}
    try:
        started = {job.name: lanes.submit(measure, job) for job in jobs}
        left = set(started.values())
        while left:
            done, left = wait(left, POLL, FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                break
            if progress is not None:
                progress(context.events.snapshot(total, 0, len(jobs)))
    except KeyboardInterrupt:
        raise InterruptedMerge("interrupted; a report keeps nothing, run it again") from None
    finally:
        if any(not future.done() for future in started.values()):
            context.stop()
        lanes.shutdown(wait=True, cancel_futures=True)
    failures = [
        error
        for future in started.values()
        if not future.cancelled() and (error := future.exception()) is not None
    ]
    # Stopped is only what a failure elsewhere brings about.
    for failure in sorted(failures, key=lambda each: isinstance(each, Stopped)):
        raise failure
    return {name: future.result() for name, future in started.items()}


def _questions(tensor: Tensor, job: Job) -> Generator[Measure, Any, Figures]:
    """Look once at every tile."""
    if not tensor.num_elements:
        return Figures(1, 0, 0, 0, 0.0)
    looks: list[Look] = yield Measure(lambda tile: _look(tensor.ops, job.format, tile))
    deltas = _sums([look.deltas for look in looks])
    weights = _sums([look.weights for look in looks])
    nonfinite, inputs_nonfinite, changed, conflicts = (
        sum(each) for each in zip(*(look.counts for look in looks), strict=True)
    )
    num_experts, elements = len(job.models) - 1, tensor.num_elements
    names = job.model_names
    return Figures(
        num_tensors=1,
        elements=elements,
        nonfinite=nonfinite,
        inputs_nonfinite=inputs_nonfinite,
        squared=float(weights[0, 0]),
        products={
            (names[i], names[j]): Product(
                float(deltas[i, j]), float(deltas[i, i]), float(deltas[j, j])
            )
            for i in range(len(names))
            for j in range(i, len(names))
        },
        output=Product(float(weights[0, 1]), float(weights[0, 0]), float(weights[1, 1]))
        if tensor.has_base
        else None,
        compared=elements if tensor.has_base else 0,
        changed=changed,
        contested=elements if tensor.has_base and num_experts > 1 else 0,
        conflicts=conflicts,
    )


def _sums(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return square([exact_sum(column) for column in np.concatenate(parts).T])


def _look(ops: OpSet, written: Format, tile: Tile) -> Look:
    base, output = tile.base, tile.models[-1]
    weights = (output,) if base is None else (output, base)
    inputs = tile.models[:-1] if base is None else (base, *tile.models[:-1])
    changed = conflicts = 0
    if base is not None:
        buffers = _buffers()
        for _, piece in tile.pieces(PIECE):
            changed += _changed(ops, written, piece, buffers)
            conflicts += _conflicts(ops, piece, buffers)
    return Look(
        ops.gram_n(base, tile.models, span=SPAN),
        ops.gram_n(None, weights, span=SPAN),
        Counts(
            ops.count_nonfinite(output),
            sum(ops.count_nonfinite(each) for each in inputs),
            changed,
            conflicts,
        ),
    )


class Buffers:
    """Memory of one thread for a piece."""

    def __init__(self) -> None:
        self.left = np.empty(PIECE, np.float32)
        self.right = np.empty(PIECE, np.float32)
        self.rounded = np.empty(PIECE * 8, np.uint8)
        self.above = np.empty(PIECE, bool)
        self.below = np.empty(PIECE, bool)
        self.here = np.empty(PIECE, bool)


_local = threading.local()


def _buffers() -> Buffers:
    found: Buffers | None = getattr(_local, "buffers", None)
    if found is None:
        found = _local.buffers = Buffers()
    return found


def _changed(ops: OpSet, written: Format, piece: Tile, buffers: Buffers) -> int:
    """Elements of the output whose value is not that of the base in the output's format."""
    if piece.base is None:
        return 0
    base, output = piece.base, piece.models[-1]
    if BY_CODE[base.code] != written and written.writable and written.code is not None:
        rounded = View(buffers.rounded.ctypes.data, written.code, piece.num)
        ops.convert(rounded, base)
        base = rounded
    left, right = buffers.left[: piece.num], buffers.right[: piece.num]
    ops.convert(view(left, F32), base)
    ops.convert(view(right, F32), output)
    return int(np.count_nonzero(np.not_equal(left, right, out=buffers.here[: piece.num])))


def _conflicts(ops: OpSet, piece: Tile, buffers: Buffers) -> int:
    """Elements where one expert's delta is above zero and another's below."""
    experts = piece.models[:-1]
    if len(experts) < 2 or piece.base is None:
        return 0
    num = piece.num
    delta, here = buffers.left[:num], buffers.here[:num]
    above, below = buffers.above[:num], buffers.below[:num]
    above[:] = below[:] = False
    for expert in experts:
        ops.axpy_n(view(delta), [expert], [1.0], base=piece.base, add_base=False)
        np.logical_or(above, np.greater(delta, 0, out=here), out=above)
        np.logical_or(below, np.less(delta, 0, out=here), out=below)
    return int(np.count_nonzero(np.logical_and(above, below, out=here)))
