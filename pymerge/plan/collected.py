"""What was collected beside the models, for the methods that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pymerge.checkpoint import Checkpoint
from pymerge.errors import PlanError
from pymerge.methods.protocol import Method
from pymerge.plan.merged import MergedCheckpoint
from pymerge.plan.model import Job
from pymerge.plan.outline import Line
from pymerge.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    from pymerge.checkpoint.statistics import Statistics


def collected(
    method: Method, recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint]
) -> dict[ModelRef, Statistics]:
    """The statistics of every model that is merged; none for a method that reads none.

    :raises PlanError: a model has none.
    :raises CheckpointError: what a model has is not whole.
    """
    if method.reads is None:
        return {}
    from pymerge.checkpoint.statistics import find_statistics

    found, missing = {}, []
    merged = dict.fromkeys(s.model for part in recipe.slices for s in part.sources)
    for ref in merged:
        if method.spec.base != "input" and ref in {part.base for part in recipe.slices}:
            continue
        opened = checkpoints[ref]
        # What lies in its folder is another model's.
        is_merged = isinstance(opened, MergedCheckpoint)
        statistics = None if is_merged else find_statistics(opened, method.reads)
        if statistics is None:
            missing.append(str(ref))
        else:
            found[ref] = statistics
    if missing:
        raise PlanError(
            f"{method.spec.name} reads statistics of kind {method.reads} that were collected for "
            f"each model, found none beside {', '.join(missing)}; collect them with "
            f"pymerge.collect(model, kind={method.reads!r}) and save them into the model's folder "
            "(docs/statistics.md)"
        )
    return found


def with_statistics(job: Job, line: Line, statistics: Mapping[ModelRef, Statistics]) -> Job:
    """The job with what was collected for its tensor: of every model, or nothing where none has it.

    :raises PlanError: some models have it and others have not.
    """
    if job.kind == "copy" or not statistics:
        return job
    by_model = {str(i.source.model): i for i in line.inputs}
    entries, numbers, missing = [], [], []
    transposed = job.transposed
    for model in job.model_names:
        found = statistics[by_model[model].source.model]
        name = by_model[model].name
        entry = found.entries.get(name)
        if entry is None:
            missing.append(model)
            continue
        entries.append(entry)
        transposed = transposed or (found.kind == "gram" and found.grams[name].transposed)
        numbers.append(found.norm if found.kind == "fisher" else float(found.grams[name].rows_seen))
    if not entries:
        return job
    if missing:
        raise PlanError(
            f"tensor {job.name!r}: statistics were collected for some models and not for "
            f"{', '.join(missing)}; collect them for the same layers of every model"
        )
    return replace(
        job,
        statistics=tuple(entries),
        statistic_numbers=tuple(numbers),
        transposed=transposed,
    )
