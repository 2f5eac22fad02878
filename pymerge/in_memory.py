"""Merging tensors that are in memory already: the entry for programs that hold their own
weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import PymergeError, RecipeError
from pymerge.formats import BF16, BY_CODE, BY_TORCH_NAME, BYTES, F32, Format, promote
from pymerge.machine import compute_threads
from pymerge.methods import get_method
from pymerge.methods.protocol import (
    Apply,
    EachTensor,
    Extra,
    Folded,
    Measure,
    Method,
    Solve,
    Statistic,
    Tensor,
    Tile,
    answer,
    decide,
)
from pymerge.methods.spec import PRESET, MethodSpec, ParameterSpec, ParameterValue
from pymerge.methods.task_outputs import MASKS, VECTOR
from pymerge.methods.values import check_value
from pymerge.names import listed, nearest, shown
from pymerge.ops import reference
from pymerge.ops.executor import make_executor
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import View, view
from pymerge.ops.workspace import Workspace

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
    statistics: Sequence[Any] = (),
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
    :param statistics: for a method that reads what was collected beside models: each model's input
        Gram [inputs, inputs], or its Fisher diagonal of the tensor's shape, float32.
    :param parameters: the method's parameters, with the values a recipe may give them; one per
        model may be a number for all or a sequence.
    :returns: a new torch tensor if the first of ``tensors`` is one, else a numpy array (bfloat16 as
        uint16). Of a method that makes a model for each task a :class:`TaskTensor` of such arrays;
        of smile a dict of what stands beside the base, such as ``smile.up``.
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
    executor = make_executor(choose_ops((*chosen.ops,), asked=backend), num_threads)
    ops = executor.ops
    numbers = range(len(models))
    tensor = Tensor(
        name, shape, len(models), base_view is not None, shared, per_model, ops, names, numbers
    )
    tensor = replace(tensor, format=format)
    grams, diagonals = _statistics(chosen, statistics, shape, names)
    # A Gram's number is its rows, a diagonal's its norm, as if the tensor were the whole model.
    beside_each = [_norm(diagonal) for diagonal in diagonals] or [1.0] * len(statistics)
    tensor = replace(tensor, statistics=beside_each)
    chosen.check([tensor])
    result, out = _empty_like(tensors[0], shape, format)
    beside = _Beside(tensors[0], tensor, chosen.extras) if chosen.extras else None
    granule = chosen.granule(tensor)
    tiles = _cut(base_view, models, max(granule, TILE_ELEMENTS // granule * granule), diagonals)

    device = executor.devices[0]
    sentences: list[str] = []

    def look(run: Callable[[Tile], Any], models: Sequence[int] | None, tile: Tile) -> Any:
        tile = tile.of_models(models)
        with executor.here(tile.views, device=device) as (views, _):
            return run(tile.at(views))

    def write(apply: Apply, tile: Tile) -> Any:
        tile = tile.of_models(apply.models)
        groups = [] if beside is None else beside.views(tile)
        outputs = [out.part(tile.start, tile.num), *chain.from_iterable(groups)]
        with executor.here(tile.views, outputs, device) as (views, results):
            rest = iter(results[1:])
            extras = [list(islice(rest, len(group))) for group in groups]
            return apply.run(tile.at(views), results[0], *extras)

    with ExitStack() as stack:
        stack.enter_context(closing(executor))
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        if chosen.cost is not None and chosen.cost(tensor).num_bytes:
            workspace = stack.enter_context(Workspace(num_threads, device))
            tensor = replace(tensor, workspace=workspace, store=_Kept(), warn=sentences.append)

        def settle() -> None:
            if tensor.workspace is not None:
                tensor.workspace.settle()

        def measure(question: Measure) -> Any:
            settle()
            chosen_tiles = tiles if question.only is None else [tiles[question.only]]
            if question.within is not None:
                first, num = question.within
                chosen_tiles = [
                    tile
                    for tile in tiles
                    if first < tile.start + tile.num and tile.start < first + num
                ]
            run_all = map if question.ordered else pool.map
            if question.fold is None:
                return list(run_all(partial(look, question.run, question.models), chosen_tiles))
            total = Folded(question.run, question.fold)
            list(run_all(partial(look, total.add, question.models), chosen_tiles))
            return total.value

        def ask(question: Any) -> Any:
            if isinstance(question, Measure):
                return measure(question)
            if isinstance(question, Solve):
                with tensor.room.active():
                    return question.run()
            if isinstance(question, EachTensor):
                return {name: answer(question.run(tensor), ask)}
            if isinstance(question, Statistic):
                return grams[question.model]
            return None  # arrays have no factors

        if chosen.model_wide(tensor) and chosen.measure_model is not None:
            state = _measure_alone(chosen.measure_model, tensor, ask)
            tensor = replace(tensor, state=state)
        apply = decide(chosen, tensor, ask)
        settle()
        found = list(pool.map(partial(write, apply), tiles))
    for sentence in sorted(sentences):
        warnings.warn(f"{name}: {sentence}", stacklevel=2)
    if beside is None:
        return result
    values = apply.values([tile.measured for tile in found]) if apply.values else []
    arrays = beside.arrays(apply.wholes)
    if {VECTOR.suffix, MASKS.suffix} != arrays.keys():
        return arrays
    found_scales = chosen.scales([tensor], [values]) if chosen.scales else {}
    scales: Any = np.array([found_scales.get(each, 1.0) for each in names])
    if not isinstance(tensors[0], np.ndarray):
        import torch

        scales = torch.from_numpy(scales)
    return TaskTensor(arrays[VECTOR.suffix], arrays[MASKS.suffix], scales)


class TaskTensor(NamedTuple):
    """What makes of the base one tensor for each task t: element j is ``base + scales[t]·vector``
    where bit ``j % 8`` of ``masks[t, j // 8]`` is set, else the base's.

    ``masks`` is uint8 [num_tasks, ceil(n / 8)], ``scales`` float64 [num_tasks], as if the tensor
    were the whole model.
    """

    vector: Any
    masks: Any
    scales: Any


class _Beside:
    """The memory of a tensor's extras."""

    def __init__(self, pattern: Any, tensor: Tensor, extras: Sequence[Extra]) -> None:
        self._pattern, self._format = pattern, tensor.format
        self._shapes = {each.suffix: each.shape_of(tensor) for each in extras if each.shape}
        self._arrays: dict[str, Any] = {}
        self._rows: list[tuple[bool, list[View]]] = []
        for extra in extras:
            shape = extra.shape_of(tensor)
            if extra.shape or shape is None:
                continue
            num_rows = tensor.num_models if extra.per_model else 1
            if extra.bits is None:
                array, whole = _empty_like(pattern, shape, tensor.format)
                size = whole.num // num_rows
            else:
                array = np.zeros(shape, np.uint8)
                whole, size = View(array.ctypes.data, BYTES, array.size), shape[1]
            rows = [whole.part(row * size, size) for row in range(num_rows)]
            self._arrays[extra.suffix] = array
            self._rows.append((extra.bits is not None, rows))

    def views(self, tile: Tile) -> list[list[View]]:
        """The tile's part of the rows of each extra; it begins with a byte."""
        first, num_bytes = tile.start // 8, -(-tile.num // 8)
        return [
            [row.part(*((first, num_bytes) if bits else (tile.start, tile.num))) for row in rows]
            for bits, rows in self._rows
        ]

    def arrays(self, wholes: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
        """The extras by their suffix."""
        found = dict(self._arrays)
        for suffix, shape in self._shapes.items():
            if shape is not None:
                found[suffix], _ = _empty_like(self._pattern, shape, self._format)
                _bytes_of(found[suffix])[:] = wholes[suffix].reshape(-1).view(np.uint8)
        if isinstance(self._pattern, np.ndarray):
            return found
        import torch

        return {
            suffix: torch.from_numpy(array) if isinstance(array, np.ndarray) else array
            for suffix, array in found.items()
        }


def _bytes_of(array: Any) -> NDArray[np.uint8]:
    """The memory of a numpy array or torch tensor."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    import torch

    memory: NDArray[np.uint8] = array.reshape(-1).view(torch.uint8).numpy()
    return memory


def _measure_alone(measure_model: Any, tensor: Tensor, measure: Any) -> Any:
    """A model-wide measurement where the one tensor is the whole model."""

    def measure_named(question: Any) -> Any:
        found = measure(question)
        is_look = isinstance(question, Measure)
        return {tensor.name: found} if is_look and question.fold is None else found

    return answer(measure_model([tensor]), measure_named)


class _Kept(dict[str, Any]):
    """What a model-wide measurement keeps, in memory."""

    def put(self, name: str, array: Any) -> None:
        self[name] = array

    def get(self, name: str) -> Any:  # type: ignore[override]
        return self[name]


def _check_inputs(spec: MethodSpec, base: Any | None, tensors: Sequence[Any]) -> None:
    if spec.base == "required" and base is None:
        raise RecipeError(f"{spec.name} needs a base tensor, found None")
    if isinstance(tensors, str) or not isinstance(tensors, Sequence):
        raise PymergeError(
            "merge_tensor: tensors is a list of arrays, one for each model, found "
            f"{type(tensors).__name__}"
        )
    if len(tensors) < spec.min_models or (
        spec.max_models is not None and len(tensors) > spec.max_models
    ):
        besides = "" if base is None or spec.base == "input" else " besides the base"
        raise RecipeError(
            f"{spec.name} takes {spec.model_count} tensors{besides}, found {len(tensors)}"
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
    preset = given.get(PRESET, spec.parameters[PRESET].default if PRESET in spec.parameters else "")
    for name, parameter in spec.parameters.items():
        value = given[name] if name in given else spec.default(name, preset)
        if value is None:
            raise RecipeError(f"{spec.name} needs the parameter {name!r}: {parameter.doc}")
        if parameter.scope == "shared":
            shared[name] = _checked(spec, parameter, value)
            continue
        is_array = isinstance(value, np.ndarray) and value.ndim == 1
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values: list[Any] = [value] * num_models
        if is_array or is_list:
            values = list(cast(Sequence[Any], value))
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


def _norm(diagonal: View) -> float:
    return float(np.sqrt(np.square(reference.value(diagonal), dtype=np.float64).sum()))


def _statistics(
    method: Method, given: Sequence[Any], shape: tuple[int, ...], names: Sequence[str]
) -> tuple[list[Any], list[View]]:
    """What was collected, as the lower triangles of Grams or as the views of diagonals."""
    spec = method.spec
    if not given and method.reads is not None:
        what = "Gram matrix of the inputs" if method.reads == "gram" else "Fisher diagonal"
        raise PymergeError(
            f"merge_tensor: {spec.name} needs statistics=[...], each model's {what}; found none"
        )
    if not given:
        return [], []
    if method.reads is None or len(given) != len(names):
        expected = f"{len(names)}" if method.reads else "none: the method reads none"
        raise PymergeError(
            f"merge_tensor: {spec.name} with {len(given)} statistics, expected {expected}"
        )
    if method.reads == "fisher":
        views = [_view(array, f"statistics[{i}]") for i, array in enumerate(given)]
        for index, array in enumerate(given):
            if tuple(array.shape) != shape:
                raise PymergeError(
                    f"merge_tensor: statistics[{index}] has shape {tuple(array.shape)}, expected "
                    f"{shape} as the tensors"
                )
        return [], views
    grams = []
    for index, array in enumerate(given):
        matrix = np.asarray(array, np.float32)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise PymergeError(
                f"merge_tensor: statistics[{index}] has shape {matrix.shape}, expected a Gram "
                "matrix [inputs, inputs]"
            )
        grams.append(matrix[np.tril_indices(len(matrix))])
    return grams, []


def _cut(
    base: View | None,
    models: Sequence[View],
    tile_elements: int,
    diagonals: Sequence[View] = (),
) -> list[Tile]:
    whole = Tile(0, models[0].num, base, tuple(models), tuple(diagonals))
    return [tile for _, tile in whole.pieces(tile_elements)]
