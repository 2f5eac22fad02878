"""Jobs of a merge that mergekit planned, as a plan of ours; memory, seed and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.api import READERS, default_memory
from pymerge.checkpoint import Checkpoint
from pymerge.engine import run_plan
from pymerge.engine.events import Snapshot
from pymerge.errors import PlanError
from pymerge.integrations.mergekit_graph import Lowering
from pymerge.integrations.mergekit_tally import LOG
from pymerge.machine import compute_threads
from pymerge.methods.numerics import Numerics
from pymerge.plan.assemble import Drafted, assemble
from pymerge.plan.model import IDLE_BYTES, Job, Plan
from pymerge.sizes import parse_size

#: What torch's generator begins with where nobody seeds it.
_TORCH_DEFAULT_SEED = 67280421310721


def assemble_jobs(
    jobs: Sequence[Job],
    lowering: Lowering,
    checkpoints: Mapping[str, Checkpoint],
    *,
    shard_bytes: int,
    memory: int | str | None,
    threads: int | None,
    backend: str | None,
) -> Plan:
    """The plan of the jobs; mergekit writes the files beside the weights.

    :raises PlanError: the jobs do not fit into the memory that the host leaves.
    """
    read = {str(entry.file) for job in jobs for entry in job.sources}
    donor = replace(next(iter(checkpoints.values())), folder=None, config={})
    drafted = Drafted(
        recipe_text=f"mergekit: {lowering.method.spec.name}",
        method=lowering.method,
        numerics=lowering.numerics,
        checkpoints={
            name: checkpoint
            for name, checkpoint in checkpoints.items()
            if any(str(header.path) in read for header in checkpoint.headers)
        },
        donor=donor,
        tokenizer_donor=donor,
        jobs=jobs,
        config=lambda jobs: None,
    )
    return assemble(
        drafted,
        memory=left_of(memory),
        threads=compute_threads(threads),
        readers=READERS,
        shard_bytes=shard_bytes,
        backend=backend,
    )


def left_of(memory: int | str | None) -> int:
    """What a budget for the whole process leaves us beside what mergekit holds already.

    :raises PlanError: it leaves nothing.
    """
    if memory is None:
        return default_memory()
    total, held = parse_size(memory, "memory"), _resident_bytes()
    left = total - max(0, held - IDLE_BYTES)
    if left <= 0:
        raise PlanError(
            f"memory: expected more than the {held:,} bytes that mergekit's process holds before "
            f"it merges, found {total:,}; give more"
        )
    return left


def _resident_bytes() -> int:
    """What this process holds in memory now, files that it maps left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def seed_of_torch(numerics: Numerics = "accurate") -> int:
    """The seed of random masks: the one that torch was seeded with (--random-seed).

    Where nobody seeded it, 0 for our own masks; mergekit's come from torch's default then.
    """
    import torch

    seed = torch.initial_seed()
    return 0 if seed == _TORCH_DEFAULT_SEED and numerics == "accurate" else seed


def run_reported(plan: Plan, out: Path, *, side_files: Mapping[str, bytes], quiet: bool) -> None:
    """Run a plan as mergekit would run a merge: a bar, and warnings in its log.

    Like mergekit it does not wait for the device; it writes past the page cache, which is faster.
    """
    for sentence in plan.warnings:
        LOG.warning("%s", sentence)
    with Progress(quiet) as progress:
        report = run_plan(
            plan,
            out,
            side_files=side_files,
            overwrite=True,
            sync=False,
            drop_cache=True,
            progress=progress,
        )
    for sentence in report.warnings[len(plan.warnings) :]:
        LOG.warning("%s", sentence)
    for name, count in report.nonfinite.items():
        LOG.warning("%s: %d elements are NaN or infinite", name, count)


class Progress:
    """A bar of tqdm, which mergekit shows, too."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(desc="Merging (pymerge)", unit="B", unit_scale=True, disable=quiet)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, snapshot: Snapshot) -> None:
        self._bar.total = snapshot.bytes_written_total
        self._bar.n = snapshot.bytes_written
        self._bar.refresh()
