"""Merging one tensor of several models: the smallest entry for other programs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymerge.errors import PymergeError, RecipeError
from pymerge.in_memory.arguments import check_names, checked, named
from pymerge.in_memory.arrays import (
    array_view,
    empty_like,
    norm_of,
    result_format,
    statistics_of,
)
from pymerge.in_memory.beside import Beside, TaskTensor
from pymerge.in_memory.driver import Driver, Inputs
from pymerge.in_memory.tiles import cut, tile_elements
from pymerge.machine import compute_threads
from pymerge.methods.numerics import Numerics, backend_in, method_in
from pymerge.methods.protocol import Tensor
from pymerge.methods.spec import MethodSpec
from pymerge.methods.task_outputs import MASKS, VECTOR
from pymerge.ops.executor import make_executor
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import View


@dataclass(frozen=True)
class _Single:
    """The one item of a call."""

    tensor: Tensor
    given: Inputs
    out: View
    beside: Beside | None
    num_bytes: int = 0

    @contextmanager
    def inputs(self) -> Iterator[Inputs]:
        yield self.given

    @contextmanager
    def output(self) -> Iterator[View]:
        yield self.out


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
    factors: Sequence[tuple[Any, Any]] | None = None,
    numerics: Numerics = "accurate",
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
    :param factors: for a method of matrices: each model's task vector as (left [rows, rank], right
        [rank, columns]), float32 numpy arrays, instead of what the difference to the base is.
    :param numerics: ``accurate``, or ``mergekit`` to round every intermediate in the inputs' common
        dtype as mergekit does.
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
    chosen = method_in(method, numerics)
    spec = chosen.spec
    num_threads = compute_threads(threads)
    _check_inputs(spec, base, tensors)
    names = tuple(f"tensors[{index}]" for index in range(len(tensors)))
    models = [
        array_view(array, f"merge_tensor: {label}")
        for label, array in zip(names, tensors, strict=True)
    ]
    base_view = None if base is None else array_view(base, "merge_tensor: base")
    shape = tuple(tensors[0].shape)
    for label, array in zip((*names, "base"), (*tensors, base), strict=True):
        if array is not None and tuple(array.shape) != shape:
            raise PymergeError(
                f"merge_tensor: {label} has shape {tuple(array.shape)}, expected {shape} as the "
                "first tensor"
            )
    if spec.base == "input":
        base_view = None
    inputs = [*models, *(() if base_view is None else (base_view,))]
    given = named(parameters)
    check_names(spec, given)
    shared, per_model = checked(spec, given, len(models))
    ops = choose_ops(dict.fromkeys(chosen.ops), asked=backend_in(numerics, backend))
    executor = make_executor(ops, num_threads)
    grams, diagonals = statistics_of(chosen, statistics, shape, len(models))
    with Driver(chosen, executor, num_threads) as driver:
        tensor = Tensor(
            name,
            shape,
            len(models),
            base_view is not None,
            shared,
            per_model,
            executor.ops,
            names,
            range(len(models)),
            input_names=(name,) * (len(models) + int(base_view is not None)),
            # A Gram's number is its rows, a diagonal's its norm, as if this were the whole model.
            statistics=[norm_of(diagonal) for diagonal in diagonals] or [1.0] * len(statistics),
            format=result_format(out_dtype, inputs),
        )
        tensor = replace(tensor, working=result_format(None, inputs))
        chosen.check([tensor])
        for sentence in chosen.warnings([tensor]):
            warnings.warn(sentence, stacklevel=2)
        result, out = empty_like(tensors[0], shape, tensor.format)
        beside = Beside(tensors[0], tensor, chosen.extras) if chosen.extras else None
        tiles = cut(base_view, models, tile_elements(chosen, tensor), diagonals)
        (written,) = driver.merge([_Single(tensor, Inputs(tiles, grams, factors), out, beside)])
    for sentence in sorted(written.sentences):
        warnings.warn(f"{name}: {sentence}", stacklevel=2)
    if beside is None:
        return result
    apply = written.apply
    values = apply.values([tile.measured for tile in written.tiles]) if apply.values else []
    arrays = beside.arrays(apply.wholes)
    if {VECTOR.suffix, MASKS.suffix} != arrays.keys():
        return arrays
    found_scales = chosen.scales([tensor], [values]) if chosen.scales else {}
    scales: Any = np.array([found_scales.get(each, 1.0) for each in names])
    if not isinstance(tensors[0], np.ndarray):
        import torch

        scales = torch.from_numpy(scales)
    return TaskTensor(arrays[VECTOR.suffix], arrays[MASKS.suffix], scales)


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
