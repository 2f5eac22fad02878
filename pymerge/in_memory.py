"""Merging tensors that are in memory already: the entry for programs that hold their own
weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pymerge.errors import PymergeError, RecipeError
from pymerge.formats import BF16, BY_CODE, BY_TORCH_NAME, F32, Format, promote
from pymerge.machine import compute_threads
from pymerge.methods import get_method
from pymerge.methods.protocol import Measure, Tensor, Tile, decide
from pymerge.methods.spec import MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.values import check_value
from pymerge.names import listed, nearest, shown
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import View, view

TILE_ELEMENTS = 1 << 19


def merge_tensor(
    method: str,
    base: Any | None,
    tensors: Sequence[Any],
    *,
    out_dtype: str | None = None,
    threads: int | None = None,
    backend: str | None = None,
    name: str = "tensor",
    **parameters: Any,
) -> Any:
    """Merge one tensor of several models in memory.

    :param method: name of a merge method, see ``pymerge methods``.
    :param base: the base model's tensor, or None where the method needs none. All tensors are
        contiguous torch tensors on the CPU or numpy arrays, of one shape; their dtypes may differ
        (float64, float32, float16, bfloat16, float8). In methods that take the base as an input it
        must be in ``tensors``.
    :param tensors: one tensor for each model, in order; the order is part of the result.
    :param out_dtype: torch's name of the result's dtype; default: the common dtype, else float32.
    :param threads: compute threads, 1 to 1024, default all CPUs available; the result does not
        depend on it.
    :param parameters: the method's parameters, with the values a recipe may give them; one per
        model may be a number for all or a sequence.
    :returns: a new torch tensor if the first of ``tensors`` is one, else a numpy array (bfloat16 as
        uint16).
    :raises RecipeError: a parameter is unknown, missing, or its value is not allowed.
    :raises PymergeError: an input is no array, shapes differ, or an array is not contiguous or of a
        dtype that kernels do not read.

    >>> import numpy as np
    >>> base, model = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> merge_tensor("task_arithmetic", base, [model], weight=0.5)
    array([0.5, 0.5], dtype=float32)
    """
    chosen = get_method(method)
    spec = chosen.spec
    num_threads = compute_threads(threads)
    _check_inputs(spec, base, tensors)
    names = tuple(f"tensors[{index}]" for index in range(len(tensors)))
    models = [_view(array, label) for label, array in zip(names, tensors, strict=True)]
    base_view = None if base is None else _view(base, "base")
    shape = tuple(tensors[0].shape)
    for label, array in zip((*names, "base"), (*tensors, base), strict=True):
        if array is not None and tuple(array.shape) != shape:
            raise PymergeError(
                f"merge_tensor: {label} has shape {tuple(array.shape)}, expected {shape} as the "
                "first tensor"
            )
    if spec.base == "input":
        base_view = None
    format = _result_format(out_dtype, [*models, *(() if base_view is None else (base_view,))])
    shared, per_model = _parameters(spec, parameters, len(models))
    ops = choose_ops((*chosen.ops,), asked=backend)
    tensor = Tensor(name, shape, len(models), base_view is not None, shared, per_model, ops, names)
    result, out = _empty_like(tensors[0], shape, format)
    tiles = _cut(base_view, models)
    with ThreadPoolExecutor(num_threads) as pool:

        def measure(question: Measure) -> Any:
            chosen_tiles = tiles if question.only is None else [tiles[question.only]]
            results = list(pool.map(question.run, chosen_tiles))
            if question.fold is None:
                return results
            total = results[0]
            for each in results[1:]:
                total = question.fold(total, each)
            return total

        if chosen.model_wide(tensor) and chosen.measure_model is not None:
            tensor = _with_state(tensor, _measure_alone(chosen.measure_model, tensor, measure))
        apply = decide(chosen, tensor, measure)
        list(pool.map(lambda tile: apply.run(tile, _part(out, tile.start, tile.num)), tiles))
    return result


def _measure_alone(measure_model: Any, tensor: Tensor, measure: Any) -> Any:
    """A model-wide measurement where the one tensor is the whole model."""
    from pymerge.methods.protocol import answer

    def measure_named(question: Measure) -> Any:
        found = measure(question)
        return found if question.fold is not None else {tensor.name: found}

    return answer(measure_model([tensor]), measure_named)


def _with_state(tensor: Tensor, state: Any) -> Tensor:
    return Tensor(**{**tensor.__dict__, "state": state})


def _check_inputs(spec: MethodSpec, base: Any | None, tensors: Sequence[Any]) -> None:
    if spec.base == "required" and base is None:
        raise RecipeError(f"{spec.name} merges task vectors and needs a base tensor, found None")
    if isinstance(tensors, str) or not isinstance(tensors, Sequence):
        raise PymergeError(
            "merge_tensor: tensors is a list of arrays, one for each model, found "
            f"{type(tensors).__name__}"
        )
    if len(tensors) < spec.min_models or (
        spec.max_models is not None and len(tensors) > spec.max_models
    ):
        high = "any number" if spec.max_models is None else spec.max_models
        raise RecipeError(
            f"{spec.name} takes {spec.min_models} to {high} tensors, found {len(tensors)}"
        )


def _view(array: Any, label: str) -> View:
    try:
        return view(array)
    except PymergeError as error:
        raise PymergeError(f"merge_tensor: {label}: {error}") from None


def _result_format(name: Any | None, views: Sequence[View]) -> Format:
    if name is not None:
        format = BY_TORCH_NAME.get(str(name).removeprefix("torch."))
        if format is None or not format.writable:
            allowed = ", ".join(n for n, f in BY_TORCH_NAME.items() if f.writable)
            raise RecipeError(
                f"out_dtype {shown(name)} cannot be written; expected one of {allowed}"
            )
        return format
    format = promote(BY_CODE[each.code] for each in views)
    return format if format.writable else F32


def _parameters(
    spec: MethodSpec, given: Mapping[str, Any], num_models: int
) -> tuple[dict[str, ParameterValue], list[dict[str, ParameterValue]]]:
    """Shared and per-model parameters, each checked against its specification."""
    given = {name.rstrip("_"): value for name, value in given.items()}  # lambda_ for lambda
    for name in given:
        if name not in spec.parameters:
            near = nearest(name, spec.parameters)
            hint = ";" if near is None else f"; did you mean {near!r}?"
            raise RecipeError(
                f"{spec.name} has no parameter {name!r}{hint} its parameters are "
                f"{listed(spec.parameters)}"
            )
    shared: dict[str, ParameterValue] = {}
    per_model: list[dict[str, ParameterValue]] = [{} for _ in range(num_models)]
    for name, parameter in spec.parameters.items():
        value = given.get(name, parameter.default)
        if value is None:
            raise RecipeError(f"{spec.name} needs the parameter {name!r}: {parameter.doc}")
        if parameter.scope == "shared":
            shared[name] = _checked(spec, parameter, value)
            continue
        is_array = isinstance(value, np.ndarray) and value.ndim == 1
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if is_list or is_array else [value] * num_models
        if len(values) != num_models:
            raise RecipeError(
                f"{spec.name}: parameter {name!r} has {len(values)} values for {num_models} tensors"
            )
        for row, each in zip(per_model, values, strict=True):
            row[name] = _checked(spec, parameter, each)
    return shared, per_model


def _checked(spec: MethodSpec, parameter: ParameterSpec, value: Any) -> ParameterValue:
    try:
        return check_value(value.item() if isinstance(value, np.generic) else value, parameter)
    except ValueError as error:
        raise RecipeError(f"{spec.name}: {error}") from None


def _empty_like(pattern: Any, shape: tuple[int, ...], format: Format) -> tuple[Any, View]:
    if isinstance(pattern, np.ndarray):
        dtype = np.uint16 if format is BF16 else np.dtype(str(format.torch_name))
        array = np.empty(shape, dtype)
        return array, view(array, format) if format is BF16 else view(array)
    import torch

    tensor = torch.empty(shape, dtype=getattr(torch, str(format.torch_name)))
    return tensor, view(tensor)


def _part(whole: View, start: int, num: int) -> View:
    size = BY_CODE[whole.code].num_bytes
    return View(whole.ptr + start * size, whole.code, num)


def _cut(base: View | None, models: Sequence[View]) -> list[Tile]:
    num = models[0].num
    return [
        Tile(
            start,
            (count := min(TILE_ELEMENTS, num - start)),
            None if base is None else _part(base, start, count),
            tuple(_part(model, start, count) for model in models),
        )
        for start in range(0, num, TILE_ELEMENTS)
    ]
