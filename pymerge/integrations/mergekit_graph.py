"""One tensor of mergekit's task graph as a draft of a job of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pymerge.checkpoint import TensorEntry, nominal_format
from pymerge.errors import RecipeError
from pymerge.formats import Format, promote
from pymerge.integrations.mergekit_inputs import Inputs, LeftToMergekit, format_of, kind_of
from pymerge.integrations.mergekit_vocabulary import arranged
from pymerge.methods.numerics import Numerics, method_in
from pymerge.methods.protocol import Method
from pymerge.methods.registry import METHODS
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.values import check_value
from pymerge.plan.layers import is_transposed
from pymerge.plan.model import Job

VOCABULARY = ("mergekit.tokenizer.embed", "PermutedVocabulary")
MERGE = ("mergekit.merge_methods.task_adapter", "ExecuteMergeMethodTask")
#: Parameters that mergekit accepts and that change nothing: task_arithmetic prunes nothing.
WITHOUT_EFFECT = {"task_arithmetic": ("density", "rescale")}


class Lowering(NamedTuple):
    """How the tensors of one merge are lowered: by which method, and from which models."""

    method: Method
    numerics: Numerics
    inputs: Inputs
    seed: int
    #: What mergekit's tokenizer step gave, where the recipe has one.
    tokenizer: Any = None

    def draft(self, name: str, task: Any, dtype: str | None) -> Job:
        """The job that computes what a task of mergekit's does, without its place.

        :param name: of the output tensor.
        :param dtype: what the result is converted to, None where it is left as it is.
        :raises LeftToMergekit: we do not lower it, and why.
        """
        if kind_of(task) != MERGE:
            raise LeftToMergekit(f"tensors made by {kind_of(task)[1]}")
        entries, loaded_as = self._entries(task.gather_tensors)
        missing = [model for model in task.model_order if model not in entries]
        if missing:
            raise LeftToMergekit("tensors that a model lacks")
        return self._of(name, task, entries, format_of(task.dtype) or loaded_as, dtype)

    def _entries(self, task: Any) -> tuple[dict[Any, TensorEntry], Format | None]:
        if kind_of(task) != VOCABULARY:
            return self.inputs.entries(task)
        found, format = self.inputs.entries(task.gather_tensors)
        stepwise = self.numerics == "mergekit"
        return arranged(task, self.tokenizer, found, format, stepwise=stepwise), format

    def _of(
        self,
        name: str,
        task: Any,
        entries: Mapping[Any, TensorEntry],
        working: Format | None,
        dtype: str | None,
    ) -> Job:
        spec = self.method.spec
        if len({entry.shape for entry in entries.values()}) > 1:
            raise LeftToMergekit("inputs of different shapes")
        base = None if spec.base == "input" else task.base_model
        models = [model for model in task.model_order if model != base]
        working = working or promote({nominal_format(entry) for entry in entries.values()})
        format = format_of(dtype) or format_of(task.out_dtype) or working
        if not format.writable:
            raise LeftToMergekit(f"results in {format.name}")
        if not models:
            return copy_job(name, entries[base], format, str(base))
        _check_count(spec, base, len(models))
        shared = self._values(dict(task.parameters.items()), "shared")
        preset = shared.get(PRESET)
        of_models = {model: dict(v.items()) for model, v in task.input_parameters.items()}
        values = [self._values(of_models.get(model, {}), "model", preset) for model in models]
        # A format in between rounds, too.
        straight = working in (nominal_format(entries[models[0]]), format)
        if spec.name == "passthrough" and values[0]["scale"] == 1.0 and straight:
            return copy_job(name, entries[models[0]], format, str(models[0]))
        donor = self.inputs.checkpoints.get(str(base if base is not None else models[0]))
        return Job(
            name=name,
            kind="merge",
            shape=entries[models[0]].shape,
            format=format,
            base=None if base is None else entries[base],
            models=tuple(entries[model] for model in models),
            model_names=tuple(map(str, models)),
            parameters=shared,
            model_parameters=tuple(values),
            shard=0,
            offset=0,
            num_bytes=0,
            model_numbers=tuple(range(len(models))),
            transposed=is_transposed(donor.config if donor else None, name),
            working=working,
        )

    def _values(
        self, given: Mapping[str, Any], scope: str, preset: ParameterValue | None = None
    ) -> dict[str, ParameterValue]:
        """Our parameters of one scope, with the values that mergekit resolved."""
        spec = self.method.spec
        without_effect = WITHOUT_EFFECT.get(spec.name, ())
        for key, value in given.items():
            if key not in spec.parameters and key not in without_effect and value is not None:
                raise LeftToMergekit(f"{spec.name} with the parameter {key}")
        values: dict[str, ParameterValue] = {}
        for key, parameter in spec.parameters.items():
            if parameter.scope != scope or parameter.ignored:
                continue
            if given.get(key) is not None:
                values[key] = _checked(spec, parameter, given[key])
            elif key == "seed":
                values[key] = self.seed
            else:
                default = spec.default(key, given.get(PRESET, preset))
                if default is None:
                    raise LeftToMergekit(f"{spec.name} without the parameter {key}")
                values[key] = default
        return values


def find_method(name: str, numerics: Numerics, theirs: frozenset[str]) -> tuple[Method, Numerics]:
    """Our method of a name and the numerics that it computes in; those that mergekit lacks have
    one form only.

    :raises LeftToMergekit: we have none, or not in these numerics.
    """
    if name not in METHODS:
        raise LeftToMergekit(f"pymerge has no method {name!r}")
    chosen: Numerics = numerics if name in theirs else "accurate"
    try:
        method = method_in(name, chosen)
    except RecipeError as error:
        raise LeftToMergekit(str(error)) from None
    return method, chosen


def _checked(spec: MethodSpec, parameter: ParameterSpec, value: Any) -> ParameterValue:
    try:
        return check_value(value, parameter)
    except ValueError as error:
        raise LeftToMergekit(f"{spec.name}: {error}") from None


def _check_count(spec: MethodSpec, base: Any, count: int) -> None:
    if spec.base == "required" and base is None:
        raise LeftToMergekit(f"{spec.name} without a base")
    if count < spec.min_models or (spec.max_models is not None and count > spec.max_models):
        raise LeftToMergekit(f"{spec.name} of {count} models")


def copy_job(name: str, entry: TensorEntry, format: Format, model: str) -> Job:
    """The draft of a tensor that is one of the inputs', converted at most."""
    return Job(name, "copy", entry.shape, format, None, (entry,), (model,), {}, (), 0, 0, 0)
