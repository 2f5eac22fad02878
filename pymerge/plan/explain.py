"""What a recipe means for each tensor: method, parameters with their origin, inputs, cost.

Nothing is decided here: jobs are those of the plan, and origins those of the recipe's parameters as
they are resolved for the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pymerge.checkpoint import (
    AdapterTensor,
    Checkpoint,
    DerivedTensor,
    JoinedTensor,
    PartTensor,
    ScaledTensor,
    TensorEntry,
    stored_entries,
)
from pymerge.checkpoint.rows import RowsTensor
from pymerge.errors import PlanError
from pymerge.methods.spec import MethodSpec, ParameterValue
from pymerge.names import nearest, shown
from pymerge.plan.layers import find_stacks, layer_prefix
from pymerge.plan.merged import MergedTensor
from pymerge.plan.model import Job, Plan, job_converts
from pymerge.plan.outline import Line, make_outline
from pymerge.recipe import (
    DEFAULT_ORIGIN,
    Recipe,
    SliceSource,
    all_settings,
    parameters_for,
    without_effect,
)
from pymerge.recipe.values import Resolved

__all__ = [
    "DEFAULT_ORIGIN",
    "ExplainedInput",
    "ExplainedTensor",
    "ExplainedValue",
    "Explanation",
    "explain_plan",
]


@dataclass(frozen=True)
class ExplainedValue:
    """A parameter's value and where it comes from.

    ``origin`` is a place in the recipe, ``preset NAME`` or ``default``. ``filter`` is the part of
    the name that the condition asks for, ``gradient`` the values that were interpolated at
    ``position`` in [0, 1]; None and empty where there is none.
    """

    name: str
    value: ParameterValue
    origin: str
    filter: str | None = None
    gradient: tuple[ParameterValue, ...] = ()
    position: float | None = None


@dataclass(frozen=True)
class ExplainedInput:
    """A tensor that is read: of the model ``model``, called ``tensor`` there, in ``file``.

    ``made`` says what is done to the stored elements before they are merged, empty where nothing
    is. ``parameters`` are this model's own.
    """

    role: Literal["base", "model"]
    model: str
    tensor: str
    file: str
    format: str
    made: str
    parameters: tuple[ExplainedValue, ...]


@dataclass(frozen=True)
class ExplainedTensor:
    """One output tensor.

    ``note`` says why it is copied, empty where it is merged. ``working`` is the format that
    mergekit would compute in. ``tensor`` is its name, but for one of packed experts that of all of
    them together. ``num_looks`` is how often its inputs are read from storage,
    ``bytes_read`` all bytes of these reads, ``matrix_bytes`` and ``flops`` what its matrices take.
    """

    name: str
    kind: Literal["merged", "copied"]
    note: str
    shape: tuple[int, ...]
    format: str
    working: str
    layer: int | None
    inputs: tuple[ExplainedInput, ...]
    parameters: tuple[ExplainedValue, ...]
    bytes_read: int
    bytes_written: int
    num_looks: float
    matrix_bytes: int
    flops: float
    tensor: str

    @property
    def values(self) -> Iterator[ExplainedValue]:
        """Shared values, then those of each model."""
        yield from self.parameters
        for each in self.inputs:
            yield from each.parameters


@dataclass(frozen=True)
class Explanation:
    """What a recipe means.

    ``unused`` are sentences about settings that decide no tensor, ``without_effect`` about those
    that change nothing in the method; both are of the whole recipe, whatever tensors are asked for.
    """

    method: str
    summary: str
    numerics: str
    models: tuple[str, ...]
    tensors: tuple[ExplainedTensor, ...]
    num_tensors: int
    unused: tuple[str, ...]
    without_effect: tuple[str, ...]
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> ExplainedTensor:
        """The tensor of that name. Raises KeyError."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def explain_plan(recipe: Recipe, plan: Plan, tensor: str | None = None) -> Explanation:
    """Explain the tensor of that name or, without one, those that have it in their name.

    :param plan: the plan of this recipe.
    :raises PlanError: no output tensor has it in its name.
    """
    lines = _lines(recipe, plan)
    stacks = find_stacks([job.name for job in plan.jobs])
    used: set[str] = set()
    explained = []
    for job in plan.jobs:
        stack = stacks.get(layer_prefix(job.name) or "")
        split = None if stack is None else stack.split(job.name)
        line = lines.get(job.name, lines.get(job.tensor_name))
        found = _tensor(recipe, plan, job, line, None if split is None else split[0])
        used.update(value.origin for value in found.values)
        explained.append(found)
    chosen = explained if tensor is None else _chosen(explained, tensor)
    return Explanation(
        method=plan.method.spec.name,
        summary=plan.method.spec.summary,
        numerics=plan.numerics,
        models=tuple(plan.checkpoints),
        tensors=tuple(chosen),
        num_tensors=plan.num_tensors,
        unused=tuple(_unused(recipe, used)),
        without_effect=tuple(without_effect(recipe)),
        warnings=plan.warnings,
    )


def _lines(recipe: Recipe, plan: Plan) -> dict[str, Line]:
    """The outline that the plan was made of, by output tensor."""
    opened: Mapping[str, Checkpoint] = plan.checkpoints
    checkpoints = {ref: opened[str(ref)] for ref in recipe.models}
    outline = make_outline(recipe, checkpoints)
    return {line.name: line for line in outline.lines}


def _chosen(tensors: Sequence[ExplainedTensor], wanted: str) -> list[ExplainedTensor]:
    exact = [each for each in tensors if wanted in (each.name, each.tensor)]
    found = exact or [each for each in tensors if wanted in each.name]
    if not found:
        match = nearest(wanted, [each.name for each in tensors])
        hint = f"; did you mean {match!r}?" if match else "; pymerge plan --tensors lists them"
        raise PlanError(f"no output tensor has {shown(wanted)} in its name{hint}")
    return found


def _tensor(
    recipe: Recipe, plan: Plan, job: Job, line: Line | None, layer: int | None
) -> ExplainedTensor:
    merged = job.kind == "merge"
    spec = plan.method.spec
    shared: tuple[ExplainedValue, ...] = ()
    if merged:
        shared = _values(recipe, spec, line, None, job.name, job.parameters)
    inputs = []
    if job.base is not None:
        inputs.append(_input("base", _base_name(line), job.base, ()))
    sources = {} if line is None else {str(i.source.model): i for i in line.inputs}
    own: Sequence[Mapping[str, ParameterValue]] = job.model_parameters or [{}] * len(job.models)
    for name, entry, values in zip(job.model_names, job.models, own, strict=False):
        found = sources.get(name)
        source, input_name = (found.source, found.name) if found else (None, entry.name)
        of_model = (
            _values(recipe, spec, line, source, input_name, values) if merged and source else ()
        )
        inputs.append(_input("model", name, entry, of_model))
    cost = job.cost
    return ExplainedTensor(
        name=job.name,
        kind="merged" if merged else "copied",
        note="" if merged else _copy_note(job, recipe),
        shape=job.shape,
        format=job.format.name,
        working=job.working.name,
        layer=layer,
        inputs=tuple(inputs),
        parameters=shared,
        bytes_read=round(job.source_bytes * plan.looks[job.name]) + job.once_bytes,
        bytes_written=job.output_bytes,
        num_looks=plan.looks[job.name],
        matrix_bytes=cost.num_bytes,
        flops=cost.flops32 + cost.flops64 + cost.eigen64,
        tensor=job.tensor_name,
    )


def _values(
    recipe: Recipe,
    spec: MethodSpec,
    line: Line | None,
    source: SliceSource | None,
    input_name: str,
    values: Mapping[str, Any],
) -> tuple[ExplainedValue, ...]:
    """The job's values with their origins."""
    origins: dict[str, Resolved] = {}
    if line is not None:
        parameters_for(
            recipe,
            spec,
            line.slice,
            source,
            output_name=line.name,
            input_name=input_name,
            t=line.t,
            origins=origins,
        )
    explained = []
    for name, value in values.items():
        found = origins.get(name, Resolved(value, "the plan"))
        position = line.t if line is not None and found.gradient else None
        explained.append(
            ExplainedValue(name, value, found.origin, found.filter, found.gradient, position)
        )
    return tuple(explained)


def _base_name(line: Line | None) -> str:
    return "" if line is None or line.slice.base is None else str(line.slice.base)


def _input(
    role: Literal["base", "model"],
    model: str,
    entry: TensorEntry,
    parameters: tuple[ExplainedValue, ...],
) -> ExplainedInput:
    stored = stored_entries(entry)[0]
    return ExplainedInput(
        role, model, entry.name, stored.file.name, entry.format.name, _made(entry), parameters
    )


def _made(entry: TensorEntry) -> str:
    """What is done to what is stored."""
    if isinstance(entry, DerivedTensor):
        formats = dict.fromkeys(each.format.name for each in stored_entries(entry))
        return f"{_KINDS.get(type(entry), 'made')}, of {' and '.join(formats)}"
    if isinstance(entry, AdapterTensor) and entry.update is not None:
        kind = "LoRA" if entry.update.magnitude is None else "DoRA"
        return f"{kind} of rank {entry.update.rank} put on, scale {entry.update.scale:g}"
    return ""


#: How the kinds of derived tensors are made.
_KINDS: Mapping[type[DerivedTensor], str] = {
    JoinedTensor: "experts joined to one tensor",
    MergedTensor: "merged by an earlier document",
    PartTensor: "a part of a tensor",
    RowsTensor: "rows for the output's vocabulary",
    ScaledTensor: "codes times scales",
}


def _copy_note(job: Job, recipe: Recipe) -> str:
    entry = job.models[0]
    if not entry.format.is_float:
        return f"{entry.format.name} is not floating point: taken from the donor {recipe.donor}"
    how = "converted" if job_converts(job) else "copied byte by byte"
    return f"only one model takes part: {how}"


def _unused(recipe: Recipe, used: set[str]) -> Iterator[str]:
    """A sentence for each place of the document whose value no tensor has."""
    places = {
        branch.origin: setting.spec.name
        for setting in all_settings(recipe)
        for branch in setting.branches
        if branch.values
    }
    for origin, name in places.items():
        if origin not in used:
            yield f"{origin}: no tensor takes its {name} from here"
