"""Cut the memory budget into blocks so that every job of a plan fits.

All tensor data lives in blocks of one size, taken before a read and returned after the write. Tiles
are small enough that several are in flight (one is read while another is computed and a third
written) and large enough that the cost of handling one disappears.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pymerge.errors import PlanError
from pymerge.methods.protocol import SPAN
from pymerge.ops import device
from pymerge.ops.workspace import PANEL
from pymerge.plan.model import TORCH_BYTES, Job, Tiling
from pymerge.sizes import format_size

#: What the process needs beside its blocks: interpreter, libraries, thread stacks, and a share of
#: the budget for the candidates and tables of a selection.
OVERHEAD_BYTES = 96 << 20
SELECTION_SHARE = 16
SMALLEST_ARENA = 32 << 20
#: What a look may need for each thread and model: a histogram, and scores of a piece of a tile.
#: The budget lends them no more than a share of itself: most methods keep no tables.
TABLE_BYTES, TABLE_SHARE = 1 << 20, 4
#: What a thread holds of the panels that it works on, for each row or column of a matrix: four of
#: float64.
PANEL_BYTES = 4 * 8 * PANEL
#: Jobs whose adapters are in memory at once, where their matrices take no more than this share.
LANES = 3
UPDATE_SHARE = 4
#: Scratch of a thread that ranks a row, for each of its elements, and beside that for each model.
RANK_BYTES, SCORE_BYTES = 28, 4
LARGEST_BLOCK = (2 << 20) + Tiling.SLACK
#: One span of the widest format.
SMALLEST_BLOCK = SPAN * 8 + Tiling.SLACK
PAGE = 4096


def cut_memory(jobs: Sequence[Job], memory: int, threads: int, readers: int) -> Tiling:
    """The tiling of a plan within ``memory`` bytes for the whole process.

    :raises PlanError: the budget cannot hold one tile of the widest job.
    """
    least = OVERHEAD_BYTES + SMALLEST_ARENA
    if memory < least:
        raise PlanError(
            f"a memory of {format_size(memory)} is too little: the program itself takes "
            f"about {OVERHEAD_BYTES >> 20} MiB and needs {SMALLEST_ARENA >> 20} MiB to stream; "
            f"give at least {least >> 20} MiB"
        )
    tables = threads * TABLE_BYTES * max((len(job.models) for job in jobs), default=0)
    overhead = OVERHEAD_BYTES + max(memory // SELECTION_SHARE, min(tables, memory // TABLE_SHARE))
    matrices, matrix_threads = _matrix_bytes(jobs, memory, overhead, threads, tables)
    overhead += matrices + (TORCH_BYTES if matrices else 0)
    updates = _update_bytes(jobs, memory, overhead)
    scratch = threads * max(map(_row_scratch, jobs), default=0)
    overhead += updates + scratch
    arena = max(SMALLEST_ARENA, memory - overhead)
    widest = max((job.num_inputs + job.output_blocks for job in jobs), default=2)
    in_flight = threads + 3
    rows = max((job.granule * job.element_bytes for job in jobs if job.granule > 1), default=0)
    least_block = max(SMALLEST_BLOCK, -(-(rows + Tiling.SLACK) // PAGE) * PAGE)
    block = min(max(LARGEST_BLOCK, least_block), arena // (widest * in_flight))
    block -= block % PAGE
    if block < least_block:
        if least_block > SMALLEST_BLOCK:
            raise PlanError(
                _too_long_rows(jobs, memory, updates + scratch + least_block * widest * in_flight)
            )
        least = SMALLEST_BLOCK * widest * in_flight
        if matrices:
            # More memory means more threads at the matrices, up to all of them.
            most = sorted((job.cost.num_bytes for job in jobs), reverse=True)[:2]
            least += sum(most) + threads * _panel_bytes(jobs) + TORCH_BYTES
        needed = _enough(OVERHEAD_BYTES + updates + scratch + least, tables)
        raise PlanError(
            f"a memory of {format_size(memory)} is too little to merge "
            f"{max(len(job.sources) for job in jobs)} tensors at once; give at "
            f"least {(needed >> 20) + 1} MiB"
        )
    return Tiling(
        memory,
        overhead,
        block,
        arena // block,
        threads,
        readers,
        updates,
        matrices,
        matrix_threads,
    )


def _panel_bytes(jobs: Sequence[Job]) -> int:
    """What one thread holds of the panels of the longest matrix."""
    matrices = (job for job in jobs if job.cost.num_bytes and job.cost.panels)
    return PANEL_BYTES * max((max(job.shape) for job in matrices), default=0)


def _enough(fixed: int, tables: int) -> int:
    """A memory of which so many bytes are left beside the selection's and the tables' shares."""
    beside_tables = min(fixed + tables, fixed * TABLE_SHARE // (TABLE_SHARE - 1))
    return max(fixed * SELECTION_SHARE // (SELECTION_SHARE - 1), beside_tables)


def _matrix_bytes(
    jobs: Sequence[Job], memory: int, overhead: int, threads: int, tables: int
) -> tuple[int, int]:
    """What the matrices of the jobs in progress may take: those of any one job, and of a second
    beside it where that leaves half of the memory; and how many threads have room for the panels
    that they work on.

    :raises PlanError: the budget cannot hold the matrices of one job.
    """
    sizes = sorted((job.cost.num_bytes for job in jobs), reverse=True)
    if not sizes or not sizes[0]:
        return 0, threads
    panels = _panel_bytes(jobs)
    room = memory - overhead - TORCH_BYTES - SMALLEST_ARENA
    if sizes[0] + panels > room:
        job = max(jobs, key=lambda job: job.cost.num_bytes)
        rest = OVERHEAD_BYTES + TORCH_BYTES + SMALLEST_ARENA + panels
        needed = _enough(rest + sizes[0], tables)
        raise PlanError(
            f"a memory of {format_size(memory)} is too little: the matrices of tensor "
            f"{job.name!r} {list(job.shape)} take {format_size(sizes[0])} beside the "
            f"{format_size(rest)} of the program; give at least {(needed >> 20) + 1} MiB"
        )
    workers = min(threads, (room - sizes[0]) // panels) if panels else threads
    both = sum(sizes[:2]) + workers * panels
    return both if both <= room // 2 else sizes[0] + workers * panels, workers


def check_devices(jobs: Sequence[Job], backends: Collection[str]) -> None:
    """:raises PlanError: the matrices of a job do not fit on a device of the plan's ops."""
    largest = max(jobs, key=lambda job: job.cost.num_bytes, default=None)
    if largest is None or not largest.cost.num_bytes:
        return
    for backend in backends:
        if device.memory_of(backend) == "host":
            continue
        for each in device.devices_for(backend):
            if largest.cost.num_bytes > each.total_memory:
                raise PlanError(
                    f"the matrices of tensor {largest.name!r} {list(largest.shape)} take "
                    f"{format_size(largest.cost.num_bytes)}, device {each.index} ({each.name}) "
                    f"has {format_size(each.total_memory)}; give --backend cpu"
                )


def _row_scratch(job: Job) -> int:
    """Bytes beside the blocks that a thread needs for one row of a job."""
    if job.granule == 1:
        return 0
    return job.granule * (RANK_BYTES + SCORE_BYTES * len(job.models))


def _update_bytes(jobs: Sequence[Job], memory: int, overhead: int) -> int:
    """What the adapters' matrices of the jobs in progress may take: at least those of any one job,
    those of all lanes where that is no more than a share of the memory.

    :raises PlanError: the budget cannot hold the matrices of one job.
    """
    sizes = sorted((job.update_bytes for job in jobs), reverse=True)
    largest = sizes[0] if sizes else 0
    if largest > max(0, memory - overhead - SMALLEST_ARENA):
        job = max(jobs, key=lambda job: job.update_bytes)
        least = OVERHEAD_BYTES + SMALLEST_ARENA + largest
        needed = least * SELECTION_SHARE // (SELECTION_SHARE - 1)
        raise PlanError(
            f"a memory of {format_size(memory)} is too little: the adapters' matrices for "
            f"tensor {job.name!r} take {(largest >> 20) + 1} MiB; give at least "
            f"{(needed >> 20) + 1} MiB"
        )
    return min(sum(sizes[:LANES]), max(largest, (memory - overhead) // UPDATE_SHARE))


def _too_long_rows(jobs: Sequence[Job], memory: int, arena: int) -> str:
    longest = max(jobs, key=lambda job: job.granule * job.element_bytes)
    needed = -(-(arena + OVERHEAD_BYTES) * SELECTION_SHARE // (SELECTION_SHARE - 1) >> 20) + 1
    return (
        f"a memory of {format_size(memory)} is too little: the method looks at whole rows, "
        f"and those of tensor {longest.name!r} have {longest.granule} elements in each of "
        f"{len(longest.sources)} models; give at least {needed} MiB"
    )
