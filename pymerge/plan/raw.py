"""A recipe over bare files of weights: tensors merge by name, without layers or configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pymerge.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.errors import CheckpointError, PlanError, RecipeError
from pymerge.methods.numerics import Numerics, method_in
from pymerge.plan.assemble import Drafted, assemble
from pymerge.plan.model import Plan
from pymerge.plan.outline import Input, Line
from pymerge.plan.planner import draft_job
from pymerge.recipe import ModelRef, OutputSlice, Recipe, expand, unmatched_filters
from pymerge.sizes import MAX_BYTES, counted

#: Which tensors are merged: those of every file, which all have the same; those that every file
#: has; those that any file has.
Names = Literal["same", "intersection", "union"]
_NUM_SHOWN = 5


def make_raw_plan(
    recipe: Recipe,
    *,
    names: Names,
    memory: int,
    threads: int,
    readers: int,
    backend: str | None = None,
    allow_pickle: bool = False,
    strict: bool = False,
    numerics: Numerics = "accurate",
    random_seed: int | None = None,
) -> Plan:
    """Open the files' headers and decide everything; all tensors go into one file.

    Every tensor stands at position 0 of a gradient. ``memory`` is bytes for the whole process.

    :raises RecipeError: the recipe chooses layers, or its method writes more than one model.
    :raises CheckpointError: an input holds no tensors.
    :raises PlanError: the files do not fit together, or not into the memory.
    """
    _check(recipe)
    checkpoints = {ref: _open(ref, allow_pickle) for ref in recipe.models}
    (merged,) = expand(recipe.modules[0], dict.fromkeys(recipe.models))
    chosen = _chosen(checkpoints, names)
    warnings = [*recipe.warnings, *unmatched_filters(recipe, chosen)]
    method = method_in(recipe.method, numerics)
    if method.extras:
        raise RecipeError(
            f"a merge of bare files writes one file, found {recipe.method}, which puts more beside "
            "the model; merge folders of models with it"
        )
    partly: list[str] = []
    drafts = [
        draft_job(recipe, method, _line(name, merged, checkpoints), None, True, partly)
        for name in chosen
    ]
    if partly:
        warnings.append(f"{counted(len(partly), 'tensor')} not in all files, as {partly[0]}")
    donor = checkpoints[recipe.donor]
    drafted = Drafted(
        recipe_text=recipe.text,
        method=method,
        numerics=numerics,
        checkpoints={str(ref): checkpoint for ref, checkpoint in checkpoints.items()},
        donor=donor,
        tokenizer_donor=donor,
        jobs=drafts,
        config=lambda jobs: None,
        warnings=warnings,
        weights_only=True,
        random_seed=random_seed,
    )
    return assemble(
        drafted,
        memory=memory,
        threads=threads,
        readers=readers,
        shard_bytes=MAX_BYTES,
        backend=backend,
        strict=strict,
    )


def _check(recipe: Recipe) -> None:
    """:raises RecipeError: the recipe has what bare files have not."""
    if recipe.modules[0].name is not None or not recipe.whole_models:
        raise RecipeError("a merge of bare files takes models, found modules or slices")
    if recipe.tokenizer is not None or recipe.chat_template is not None:
        raise RecipeError(
            "a merge of bare files writes no tokenizer, found tokenizer, tokenizer_source or "
            "chat_template; leave them out"
        )


def _open(ref: ModelRef, allow_pickle: bool) -> Checkpoint:
    opened = open_checkpoint(ref.model, adapter=ref.adapter, allow_pickle=allow_pickle)
    if opened.hub_id is not None:
        raise CheckpointError(f"model {ref}: expected a file of weights, found a model of the hub")
    return opened


def _chosen(checkpoints: Mapping[ModelRef, Checkpoint], names: Names) -> list[str]:
    """The names to merge, in the order of the files.

    :raises PlanError: names are not the same and were to be, or none is left.
    """
    everything = dict.fromkeys(name for opened in checkpoints.values() for name in opened.tensors)
    shared = [
        name
        for name in everything
        if all(name in opened.tensors for opened in checkpoints.values())
    ]
    if names == "same" and len(shared) < len(everything):
        raise PlanError(_difference(checkpoints, [n for n in everything if n not in set(shared)]))
    chosen = list(everything) if names == "union" else shared
    if not chosen:
        raise PlanError(
            f"the files {', '.join(map(str, checkpoints))} have no tensor name in common"
        )
    return chosen


def _difference(checkpoints: Mapping[ModelRef, Checkpoint], names: Sequence[str]) -> str:
    lines = [
        f"\n  {name}: missing in "
        + ", ".join(str(ref) for ref, opened in checkpoints.items() if name not in opened.tensors)
        for name in names[:_NUM_SHOWN]
    ]
    more = len(names) - len(lines)
    return (
        f"expected the same tensor names in all files, found {len(names)} that not all have; give "
        "--tensor-intersection to leave them out, or --tensor-union to merge each from the files "
        f"that have it:{''.join(lines)}" + (f"\n  and {more} more" if more else "")
    )


def _line(name: str, merged: OutputSlice, checkpoints: Mapping[ModelRef, Checkpoint]) -> Line:
    inputs = tuple(
        Input(source, name, checkpoints[source.model].tensors.get(name))
        for source in merged.sources
    )
    return Line(name, _pattern(merged, inputs), merged, inputs, 0.0)


def _pattern(merged: OutputSlice, inputs: Sequence[Input]) -> TensorEntry:
    """The tensor of the base where it has it, else of the first file that does."""
    present = [each for each in inputs if each.entry is not None]
    first = next((each for each in present if each.source.model == merged.base), present[0])
    return first.entry  # type: ignore[return-value]
