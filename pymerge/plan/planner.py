"""Recipe + headers → plan. No tensor byte is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from pymerge.checkpoint import (
    Checkpoint,
    TensorEntry,
    laid_out_like,
    nominal_format,
    open_checkpoint,
    output_config,
    set_part_layers,
    update_of,
    with_adapter,
)
from pymerge.checkpoint.vocabulary import is_vocabulary
from pymerge.errors import CheckpointError, PlanError
from pymerge.formats import Format, promote
from pymerge.methods.numerics import Numerics, method_in
from pymerge.methods.protocol import Method
from pymerge.names import nearest
from pymerge.plan.assemble import SHARD_BYTES, Drafted, assemble
from pymerge.plan.collected import collected, with_statistics
from pymerge.plan.layers import is_transposed
from pymerge.plan.model import Job, Plan
from pymerge.plan.outline import Input, Line, Outline, make_outline
from pymerge.plan.tokenizers import (
    OutputTokenizer,
    check_files,
    output_tokenizer,
    resized,
    truncated,
)
from pymerge.recipe import ModelRef, Recipe, parameters_for, unmatched_filters
from pymerge.sizes import counted


def make_plan(
    recipe: Recipe,
    *,
    memory: int,
    threads: int,
    readers: int,
    shard_bytes: int = SHARD_BYTES,
    backend: str | None = None,
    allow_pickle: bool = False,
    allow_missing: bool = False,
    strict: bool = False,
    numerics: Numerics = "accurate",
    random_seed: int | None = None,
    opened: Mapping[str, Checkpoint] = MappingProxyType({}),
    truncate_embeddings: bool = False,
) -> Plan:
    """Open the checkpoints' headers and decide everything.

    :param memory: bytes for the whole process.
    :param allow_missing: leave a model out of a tensor's merge where it has no such tensor.
    :param truncate_embeddings: of vocabularies with different sizes merge the rows that all have.
    :param random_seed: the seed of random methods, instead of the recipe's.
    :param opened: models by the name that the recipe gives them, which are not opened again.
    :raises CheckpointError: an input is not a valid checkpoint.
    :raises PlanError: recipe and checkpoints do not fit together, or not into the memory.
    """
    checkpoints = {
        ref: _open(recipe, ref, allow_pickle, opened)
        for ref in dict.fromkeys((*recipe.models, recipe.tokenizer_donor))
    }
    donor = checkpoints[recipe.donor]
    checkpoints |= {ref: laid_out_like(checkpoints[ref], donor) for ref in recipe.models}
    outline = make_outline(recipe, checkpoints)
    if not outline.lines:
        raise PlanError(f"{recipe.donor} has no tensors; there is nothing to merge")
    method = method_in(recipe.method, numerics)
    warnings = [*recipe.warnings, *_filter_warnings(recipe, checkpoints, outline, strict)]
    check_files(recipe, checkpoints)
    tokenizer = output_tokenizer(recipe, checkpoints, numerics)
    outline = replace(outline, lines=tokenizer.align(outline.lines))
    if truncate_embeddings and recipe.tokenizer is None:
        outline = replace(outline, lines=truncated(outline.lines, warnings))
    warnings += tokenizer.warnings
    statistics = collected(method, recipe, checkpoints)
    config = checkpoints[recipe.donor].config
    drafts = [
        with_statistics(
            draft_job(recipe, method, line, config, allow_missing, warnings), line, statistics
        )
        for line in outline.lines
    ]
    copied = [line.name for line in outline.lines if not line.inputs]
    if copied:
        first = ", ".join(copied[:3])
        warnings.append(
            f"{counted(len(copied), 'tensor')} of no module that the recipe names, copied from "
            f"{recipe.donor}: {first}{', …' if len(copied) > 3 else ''}"
        )
    if outline.dropped:
        first = ", ".join(outline.dropped[:5])
        warnings.append(
            f"{len(outline.dropped)} tensors exist in other models but not in the donor "
            f"{recipe.donor} and "
            f"are left out: {first}{', …' if len(outline.dropped) > 5 else ''}"
        )
    drafted = Drafted(
        recipe_text=recipe.text,
        method=method,
        numerics=numerics,
        checkpoints={str(ref): checkpoint for ref, checkpoint in checkpoints.items()},
        donor=checkpoints[recipe.donor],
        tokenizer_donor=checkpoints[recipe.tokenizer_donor],
        jobs=drafts,
        config=partial(_config, recipe.donor, checkpoints[recipe.donor], outline, tokenizer),
        warnings=warnings,
        dropped=outline.dropped,
        statistics={str(ref): found.header for ref, found in statistics.items()},
        random_seed=random_seed,
        files=tokenizer.files,
    )
    return assemble(
        drafted,
        memory=memory,
        threads=threads,
        readers=readers,
        shard_bytes=shard_bytes,
        backend=backend,
        strict=strict,
    )


def _open(
    recipe: Recipe, ref: ModelRef, allow_pickle: bool, opened: Mapping[str, Checkpoint]
) -> Checkpoint:
    """Open one model; what is wrong with it is said with the place that names it."""
    try:
        if ref.path in opened and ref.revision is None:
            return with_adapter(opened[ref.path], ref.adapter, allow_pickle=allow_pickle)
        return open_checkpoint(ref.model, adapter=ref.adapter, allow_pickle=allow_pickle)
    except CheckpointError as error:
        places = [s.place for part in recipe.slices for s in part.sources if s.model == ref]
        if places or recipe.tokenizer is None:
            raise CheckpointError(f"{places[0] if places else ref}: {error}") from error
        near = nearest(ref.path, ("base", "union"))
        hint = f"; did you mean {near!r}?" if near else ""
        raise CheckpointError(f"{recipe.tokenizer.place}: {error}{hint}") from error


def draft_job(
    recipe: Recipe,
    method: Method,
    line: Line,
    config: Mapping[str, object] | None,
    allow_missing: bool,
    warnings: list[str],
) -> Job:
    """The job of one line, without its place."""
    if not line.inputs:
        format = _output_format(recipe, line, [line.pattern])
        return _copy(line, line.pattern, format, str(recipe.donor))
    inputs = _present(recipe, line, allow_missing, warnings)
    _check_shapes(line, inputs)
    _check_kinds(line, inputs)
    base = None
    if method.spec.base != "input" and line.slice.base is not None:
        base = next((i for i in inputs if i.source.model == line.slice.base), None)
    models = [i for i in inputs if i is not base]
    entries = [entry for i in inputs if (entry := i.entry) is not None]
    format = _output_format(recipe, line, entries)
    if not line.pattern.format.is_float:
        return _copy(line, line.pattern, line.pattern.format, "")
    shared = parameters_for(
        recipe, method.spec, line.slice, None, output_name=line.name, input_name=line.name, t=line.t
    )
    values = [
        parameters_for(
            recipe,
            method.spec,
            line.slice,
            i.source,
            output_name=line.name,
            input_name=i.name,
            t=line.t,
        )
        for i in models
    ]
    if not models and base is not None and base.entry is not None:
        return _copy(line, base.entry, format, str(base.source.model))
    _check_count(method, line, len(models))
    working = recipe.dtype or promote({nominal_format(entry) for entry in entries})
    # A format in between rounds, too.
    straight = working in (nominal_format(entries[0]), format)
    if method.spec.name == "passthrough" and values[0]["scale"] == 1.0 and straight:
        return _copy(line, entries[0], format, str(models[0].source.model))
    _check_writable(line, format)
    return Job(
        name=line.name,
        kind="merge",
        shape=line.pattern.shape,
        format=format,
        base=None if base is None else base.entry,
        models=tuple(entry for i in models if (entry := i.entry) is not None),
        model_names=tuple(str(i.source.model) for i in models),
        parameters=shared,
        model_parameters=tuple(values),
        shard=0,
        offset=0,
        num_bytes=0,
        model_numbers=tuple(_number(line, i) for i in models),
        transposed=is_transposed(config, line.name),
        working=working,
    )


def _number(line: Line, wanted: Input) -> int:
    """The position of a model among the recipe's, the base not counted."""
    others = [i for i in line.inputs if i.source.model != line.slice.base]
    return others.index(wanted) if wanted in others else line.inputs.index(wanted)


def _copy(line: Line, entry: TensorEntry, format: Format, model: str) -> Job:
    if update_of(entry) is not None:
        _check_writable(line, format)
    return Job(
        line.name, "copy", line.pattern.shape, format, None, (entry,), (model,), {}, (), 0, 0, 0
    )


def _present(recipe: Recipe, line: Line, allow_missing: bool, warnings: list[str]) -> list[Input]:
    """The inputs that have the tensor."""
    missing = [i for i in line.inputs if i.entry is None]
    if not missing:
        return list(line.inputs)
    names = ", ".join(sorted({str(i.source.model) for i in missing}))
    if not line.pattern.format.is_float:
        return [i for i in line.inputs if i.entry is not None]
    if not allow_missing:
        raise PlanError(
            f"tensor {missing[0].name!r} is in {recipe.donor} but not in {names}; check "
            "that the models are "
            "of one architecture, or give --allow-missing to merge such tensors from the "
            "models that have "
            "them"
        )
    if any(i.source.model == line.slice.base for i in missing):
        raise PlanError(
            f"tensor {line.name!r} is missing in the base model {line.slice.base}, so that "
            "it has no task "
            "vectors; choose a base that has every tensor"
        )
    warnings.append(f"tensor {line.name!r} is not in {names}: merged without")
    return [i for i in line.inputs if i.entry is not None]


def _check_shapes(line: Line, inputs: list[Input]) -> None:
    for i in inputs:
        if i.entry is not None and i.entry.shape != line.pattern.shape:
            expected, found = list(line.pattern.shape), list(i.entry.shape)
            differ = is_vocabulary(line.name) and expected[1:] == found[1:]
            hint = (
                "; the models have different tokenizers: give tokenizer_source: base or union, "
                "which puts the rows of every model in one order, or where the tokens have the "
                "same ids --unsafe-truncate-embeddings, which merges the rows that all have"
                if differ
                else "; leave the model out or choose models of one shape"
            )
            raise PlanError(
                f"tensor {i.name!r} of {i.source.model} has shape {found}, expected {expected} as "
                f"{line.pattern.name!r} in the donor{hint}"
            )


def _check_kinds(line: Line, inputs: list[Input]) -> None:
    """Numbers are merged with numbers; everything else is copied from the donor."""
    for i in inputs:
        if i.entry is not None and i.entry.format.is_float != line.pattern.format.is_float:
            raise PlanError(
                f"tensor {i.name!r} of {i.source.model} is {i.entry.format.name}, in the "
                "donor it is "
                f"{line.pattern.format.name}; floating and other types cannot be merged: choose "
                "models that store it alike"
            )


def _check_count(method: Method, line: Line, count: int) -> None:
    low, high = method.spec.min_models, method.spec.max_models
    if count < low or (high is not None and count > high):
        wanted = (
            f"{low}" if high == low else f"at least {low}" if high is None else f"{low} to {high}"
        )
        beside = " beside the base" if method.spec.base == "required" else ""
        raise PlanError(
            f"{method.spec.name} takes {wanted} model{'' if wanted == '1' else 's'}{beside}, "
            f"{line.slice.place or 'the recipe'} gives {count} for tensor {line.name!r}"
        )


def _output_format(recipe: Recipe, line: Line, entries: list[TensorEntry]) -> Format:
    """out_dtype, else dtype, else the promotion of the inputs' formats; others are kept."""
    formats = {nominal_format(entry) for entry in entries} or {line.pattern.format}
    if not all(format.is_float for format in formats):
        return line.pattern.format
    asked = recipe.out_dtype or recipe.dtype
    if asked is not None:
        return asked
    return promote(formats)


def _check_writable(line: Line, format: Format) -> None:
    if not format.writable:
        raise PlanError(
            f"tensor {line.name!r} is {format.name} in every model, which pymerge reads but "
            "does not write; "
            "choose an output type, for example dtype: bfloat16"
        )


def _filter_warnings(
    recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint], outline: Outline, strict: bool
) -> list[str]:
    names = dict.fromkeys(line.name for line in outline.lines)
    names.update(dict.fromkeys(n for ref in recipe.models for n in checkpoints[ref].tensors))
    sentences = unmatched_filters(recipe, names)
    misspelt = [sentence for sentence in sentences if strict or "did you mean" in sentence]
    if misspelt:
        raise PlanError("; ".join(misspelt))
    return sentences


def _config(
    donor: ModelRef,
    checkpoint: Checkpoint,
    outline: Outline,
    tokenizer: OutputTokenizer,
    jobs: Sequence[Job],
) -> dict[str, object] | None:
    if checkpoint.config is None:
        return None
    written: dict[str, int] = {}
    for job in jobs:
        if job.format.torch_name is not None:
            name = job.format.torch_name
            written[name] = written.get(name, 0) + job.num_bytes
    text = next((each for each in outline.rebuilt if each.role in (None, "text")), None)
    config = output_config(
        checkpoint.config,
        formats=written,
        num_layers=None if text is None else len(text.sources),
        layer_sources=None if text is None else text.sources,
        tied=False if outline.untied else None,
    )
    for each in outline.rebuilt:
        if each is not text and each.role is not None:
            set_part_layers(config, each.role, each.num_before, each.sources)
    if donor.override_architecture is not None:
        config["architectures"] = [donor.override_architecture]
    return tokenizer.fit_config(resized(config, outline.lines, checkpoint))
