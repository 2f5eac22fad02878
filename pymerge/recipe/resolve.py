"""From a recipe to the planner's questions: which layers, and which value for which tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pymerge.errors import PlanError, RecipeError
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec, ParameterValue
from pymerge.names import nearest
from pymerge.recipe.recipe import Recipe, RecipeModule, RecipeSlice, RecipeSource, Settings
from pymerge.recipe.reference import ModelRef
from pymerge.recipe.values import Resolved, Setting, resolve

#: Origin of a value that the document does not give.
DEFAULT_ORIGIN = "default"


@dataclass(frozen=True)
class SliceSource:
    """Layers ``start`` to ``stop`` of a model, the end excluded.

    ``stop`` is None where the model has no layers. ``index`` is its position in the slice,
    ``place`` where the document names it. ``appended`` marks a ``base_model`` not listed under
    ``models``.
    """

    model: ModelRef
    start: int
    stop: int | None
    index: int
    place: str
    settings: Settings = field(repr=False, compare=False)
    appended: bool = False


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output and what they are merged from.

    ``base`` is the source that deltas are taken against, None in methods that take none. ``index``
    is its position in the output of its module, ``module_settings`` are the module's.
    """

    sources: tuple[SliceSource, ...]
    base: ModelRef | None
    index: int
    place: str
    settings: Settings = field(repr=False, compare=False)
    module_settings: Settings = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_layers(self) -> int | None:
        """Layers of the output that come from this slice; None where the models have no layers."""
        first = self.sources[0]
        return None if first.stop is None else first.stop - first.start


def expand(
    module: RecipeModule | Recipe, layer_counts: Mapping[ModelRef, int | None]
) -> list[OutputSlice]:
    """The slices of a module of the output with their layers; a recipe stands for its only module.

    ``layer_counts`` has every model of the module. A count is None for a model without numbered
    layers. Raises PlanError where layers that the recipe asks for do not exist, or where whole
    models differ in their number of layers.
    """
    if isinstance(module, Recipe):
        (module,) = module.modules
    slices = []
    for index, each in enumerate(module.slices):
        _check_whole_models(each, layer_counts)
        sources = tuple(
            _source(source, position, layer_counts[source.model])
            for position, source in enumerate(each.sources)
        )
        slices.append(
            OutputSlice(sources, each.base, index, each.place, each.settings, module.settings)
        )
    return slices


def _check_whole_models(each: RecipeSlice, layer_counts: Mapping[ModelRef, int | None]) -> None:
    whole = [source.model for source in each.sources if source.layer_range is None]
    counts = {model: layer_counts[model] for model in whole}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{model} {count or 'none'}" for model, count in counts.items())
        raise PlanError(
            f"whole models must have equally many layers, found {found}; choose layers with slices "
            "instead of models"
        )


def _source(source: RecipeSource, index: int, count: int | None) -> SliceSource:
    if source.layer_range is None:
        start, stop = 0, count
    else:
        start, stop = source.layer_range
        if stop > (count or 0):
            has = "has no numbered layers" if count is None else f"has {count} layers"
            raise PlanError(
                f"{source.place}: layers {start} to {stop} (the end not included) are "
                f"asked of {source.model}, which {has}"
            )
    return SliceSource(
        source.model, start, stop, index, source.place, source.settings, source.appended
    )


def position(layer: int, num_layers: int) -> float:
    """Where layer ``layer`` of a slice stands in a gradient: 0 for the first, 1 for the last.

    The only layer of a slice stands at 1. Tensors outside the layers take 0.
    """
    return 1.0 if num_layers == 1 else layer / (num_layers - 1)


def parameters_for(
    recipe: Recipe,
    spec: MethodSpec,
    output_slice: OutputSlice,
    source: SliceSource | None,
    *,
    output_name: str,
    input_name: str,
    t: float,
    origins: dict[str, Resolved] | None = None,
) -> dict[str, ParameterValue]:
    """The values of the parameters for one tensor.

    With a ``source`` the per-model parameters of that model: its own setting, else the slice's,
    the module's, the top level's, filters matched against ``input_name``; empty for the slice's
    base. Without one the shared parameters: the slice's setting, else the module's, else the top
    level's, filters matched against ``output_name``. ``t`` is the position in gradients. ``spec``
    is the method that the recipe was loaded with. ``origins`` is filled with where each value
    comes from.

    Raises RecipeError for a required parameter that no setting gives.
    """
    if source is None:
        scope, name = "shared", output_name
        scopes = _shared_scopes(recipe, output_slice)
    elif source.model == output_slice.base:
        return {}
    else:
        scope, name = "model", input_name
        scopes = (source.settings, *_shared_scopes(recipe, output_slice))
    values: dict[str, ParameterValue] = {}
    preset = _preset(recipe, spec, output_slice, output_name, t)
    for key, parameter in spec.parameters.items():
        if parameter.scope != scope or parameter.ignored:
            continue
        for settings in scopes:
            setting = settings.get(key)
            if setting is None:
                continue
            found = resolve(setting, name, t)
            if found is not None:
                values[key] = found.value
                if origins is not None:
                    origins[key] = found
                break
        else:
            default = spec.default(key, preset)
            if default is None:
                raise RecipeError(_missing(recipe, parameter, source, name))
            values[key] = default
            if origins is not None:
                named = key in spec.presets.get(str(preset), {})
                origin = f"{PRESET} {preset}" if named else DEFAULT_ORIGIN
                origins[key] = Resolved(default, origin)
    return values


def _shared_scopes(recipe: Recipe, output_slice: OutputSlice) -> tuple[Settings, ...]:
    return output_slice.settings, output_slice.module_settings, recipe.settings


def _preset(
    recipe: Recipe, spec: MethodSpec, output_slice: OutputSlice, name: str, t: float
) -> ParameterValue | None:
    """The preset of a tensor; None where the method has none."""
    if PRESET not in spec.parameters:
        return None
    for settings in _shared_scopes(recipe, output_slice):
        setting = settings.get(PRESET)
        found = None if setting is None else resolve(setting, name, t)
        if found is not None:
            return found.value
    return spec.parameters[PRESET].default


def _missing(
    recipe: Recipe, parameter: ParameterSpec, source: SliceSource | None, tensor_name: str
) -> str:
    what = f"{recipe.method} needs the parameter {parameter.name!r}"
    example = (
        parameter.choices[0]
        if parameter.choices
        else {"bool": "true", "int": "1"}.get(parameter.kind, "0.5")
    )
    if source is None:
        return (
            f"{what} and the recipe gives none for the tensor {tensor_name!r}; write it at the top "
            f"level, as in 'parameters: {{{parameter.name}: {example}}}'"
        )
    appended = (
        f" ({recipe.method} takes base_model as an ordinary input; list it under models to give it "
        "parameters)"
        if source.appended
        else ""
    )
    return (
        f"{source.place}: {what} for each model and the recipe gives none for the model "
        f"{source.model}, tensor {tensor_name!r}{appended}; write it beside the model, as in "
        f"'- model: {source.model}' followed by 'parameters: {{{parameter.name}: {example}}}', or "
        "once for all models under the top-level parameters"
    )


def all_settings(recipe: Recipe) -> Iterator[Setting]:
    """Every setting of the document that the method knows, from the top level downwards."""
    yield from recipe.settings.values()
    for module in recipe.modules:
        yield from module.settings.values()
    for each in recipe.slices:
        yield from each.settings.values()
        for source in each.sources:
            yield from source.settings.values()


def unmatched_filters(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """A sentence for each filter that is part of none of the tensor ``names``.

    Each names the nearest run of name components (the parts between dots) where there is one.
    """
    names = list(names)
    wanted: dict[str, str] = {}
    for setting in all_settings(recipe):
        for branch in setting.branches:
            if branch.filter is not None:
                wanted.setdefault(branch.filter_origin, branch.filter)
    sentences = []
    for place, text in wanted.items():
        if any(text in name for name in names):
            continue
        match = nearest(text, _runs(names, len(text.strip(".").split("."))))
        hint = f"; did you mean {match!r}?" if match else ""
        sentences.append(f"{place}: no tensor has {text!r} in its name{hint}")
    return sentences


def _runs(names: Iterable[str], length: int) -> Iterator[str]:
    """Every run of ``length`` components of the names, once."""
    seen: set[str] = set()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - length + 1):
            run = ".".join(parts[start : start + length])
            if run not in seen:
                seen.add(run)
                yield run
