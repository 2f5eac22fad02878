"""Cut the memory budget into blocks so that every job of a plan fits.

All tensor data lives in blocks of one size, taken before a read and returned after the write. Tiles
are small enough that several are in flight (one is read while another is computed and a third
written) and large enough that the cost of handling one disappears.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.errors import PlanError
from pymerge.plan.model import Job, Tiling

#: What the process needs beside its blocks: interpreter, libraries, thread stacks, and a share of
#: the budget for the candidates and tables of a selection.
OVERHEAD_BYTES = 96 << 20
SELECTION_SHARE = 16
SMALLEST_ARENA = 32 << 20
LARGEST_BLOCK = (2 << 20) + Tiling.SLACK
SMALLEST_BLOCK = (16 << 10) + Tiling.SLACK
PAGE = 4096


def cut_memory(jobs: Sequence[Job], memory: int, threads: int, readers: int) -> Tiling:
    """The tiling of a plan within ``memory`` bytes for the whole process.

    :raises PlanError: the budget cannot hold one tile of the widest job.
    """
    least = OVERHEAD_BYTES + SMALLEST_ARENA
    if memory < least:
        raise PlanError(
            f"a memory of {memory / (1 << 20):.4g} MiB is too little: the program itself takes "
            f"about {OVERHEAD_BYTES >> 20} MiB and needs {SMALLEST_ARENA >> 20} MiB to stream; "
            f"give at least {least >> 20} MiB"
        )
    overhead = OVERHEAD_BYTES + memory // SELECTION_SHARE
    arena = max(SMALLEST_ARENA, memory - overhead)
    widest = max((len(job.sources) + 1 for job in jobs), default=2)
    in_flight = threads + 3
    block = min(LARGEST_BLOCK, arena // (widest * in_flight))
    block -= block % PAGE
    if block < SMALLEST_BLOCK:
        needed = OVERHEAD_BYTES + SMALLEST_BLOCK * widest * in_flight
        raise PlanError(
            f"a memory of {memory / (1 << 20):.4g} MiB is too little to merge {widest - 1} "
            "tensors at "
            "once; give at "
            f"least {(needed >> 20) + 1} MiB"
        )
    return Tiling(memory, overhead, block, arena // block, threads, readers)
