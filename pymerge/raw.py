"""Merging bare files of weights into one file.

1. The merge runs in a work folder beside the output, ``.NAME.pymerge``, with journal and manifest.
2. The finished file is moved to its name, which replaces what stood there in one step.
3. The work folder is removed. A run that stopped before step 2 continues there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import api
from pymerge.errors import PlanError, StorageError
from pymerge.machine import compute_threads
from pymerge.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymerge.engine.events import Snapshot
    from pymerge.engine.run import MergeReport, NonFinite
    from pymerge.methods.numerics import Numerics
    from pymerge.plan import Plan
    from pymerge.plan.raw import Names
    from pymerge.recipe import Recipe

SUFFIX = ".safetensors"


def plan_raw(
    recipe: api.RecipeSource | Recipe,
    *,
    names: Names = "same",
    memory: int | str | None = None,
    threads: int | None = None,
    backend: str | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    numerics: Numerics = "accurate",
    random_seed: int | None = None,
) -> Plan:
    """Decide everything a merge of bare files will do; only headers are read.

    :param names: ``"same"`` demands the same tensor names in all files, ``"intersection"`` merges
        those that all have, ``"union"`` each from the files that have it.

    The other parameters, and what is raised, are those of :func:`pymerge.plan`.
    """
    from pymerge.plan.raw import make_raw_plan
    from pymerge.recipe import Recipe

    loaded = recipe if isinstance(recipe, Recipe) else api.load_recipe(recipe, strict=strict)
    return make_raw_plan(
        loaded,
        names=names,
        memory=api.default_memory() if memory is None else parse_size(memory, "memory"),
        threads=compute_threads(threads),
        readers=api.READERS,
        backend=backend,
        allow_pickle=allow_pickle,
        strict=strict,
        numerics=numerics,
        random_seed=random_seed,
    )


def merge_raw(
    recipe: api.RecipeSource | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    run: dict[str, Any] | None = None,
    **planning: Any,
) -> MergeReport:
    """Merge files of weights by the names of their tensors into the one file ``out``.

    No configuration, no tokenizer and no layers: gradients take their first value everywhere. The
    file appears when it is whole; a run that was killed continues when it is started again.

    :param recipe: what :func:`plan_raw` takes, or what it returned: ``merge_method``, ``models``,
        ``base_model``, ``parameters``, ``dtype`` and ``out_dtype``, models being files.
    :param out: a name that ends in ``.safetensors``.
    :param overwrite: replace a file that is there, and what another merge into it left unfinished.
    :param run: options of :func:`pymerge.merge` about reading, writing and progress.
    :param planning: options of :func:`plan_raw`.
    :raises PlanError: ``out`` exists, is an input, or is no name for a safetensors file.

    Raises also what :func:`pymerge.merge` raises.
    """
    from pymerge.engine import run_plan
    from pymerge.plan import Plan

    target = Path(out)
    _check_target(target, overwrite)
    decided = recipe if isinstance(recipe, Plan) else plan_raw(recipe, **planning)
    work = target.with_name(f".{target.name}.pymerge")
    _check_inputs(target, decided)
    options = _options(**(run or {}))
    try:
        (shard,) = decided.shards
        moved = (work / "pymerge_manifest.json").exists() and not (work / shard.file_name).exists()
        if moved:
            shutil.rmtree(work)
        report = run_plan(decided, work, side_files={}, overwrite=overwrite, **options)
        os.replace(work / shard.file_name, target)
        if options["sync"]:
            _sync_names(target.parent)
        shutil.rmtree(work)
    except OSError as error:
        raise StorageError(
            f"{target}: the merged file cannot be put there: {error}; free the place, or choose "
            "another"
        ) from error
    return replace(report, out=target)


def _sync_names(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _options(
    *,
    non_finite: NonFinite = "warn",
    sync: bool = True,
    cache_output: bool = False,
    read_method: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: Callable[[Snapshot], None] | None = None,
    resume_hint: str = "run the same merge again",
) -> dict[str, Any]:
    """The options of :func:`pymerge.merge` as the engine calls them."""
    return {
        "nonfinite": non_finite,
        "sync": sync,
        "drop_cache": not cache_output,
        "read_method": read_method,
        "trace": None if trace is None else Path(trace),
        "progress": progress,
        "resume_hint": resume_hint,
    }


def _check_inputs(target: Path, plan: Plan) -> None:
    """:raises PlanError: the file to write is one that is read."""
    place = target.resolve()
    for reference, checkpoint in plan.checkpoints.items():
        if any(header.path.resolve() == place for header in checkpoint.headers):
            raise PlanError(
                f"{target} is the input {reference!r}, which the merge would replace; choose "
                "another name for the output"
            )


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix != SUFFIX:
        raise PlanError(
            f"{target}: expected an output file that ends in {SUFFIX}, found another name; the "
            "merged tensors are written as one such file"
        )
    if target.is_dir():
        raise PlanError(f"{target}: expected a file to write, found a folder; choose another name")
    if target.exists() and not overwrite:
        raise PlanError(f"{target} exists already; choose another name or give --overwrite")
