"""Arrays and torch tensors as the kernels take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.errors import PymergeError, RecipeError
from pymerge.formats import BF16, BY_CODE, BY_TORCH_NAME, F32, Format, promote
from pymerge.methods.protocol import Method
from pymerge.names import shown
from pymerge.ops import reference
from pymerge.ops.view import View, view


def array_view(array: Any, label: str) -> View:
    """The elements of an array; an objection names it.

    :raises PymergeError: it is no contiguous array of a dtype that kernels read.
    """
    try:
        return view(array)
    except PymergeError as error:
        raise PymergeError(f"{label}: {error}") from None


def named_format(name: Any) -> Format:
    """The format of torch's name of a dtype, which can be written.

    :raises RecipeError: there is none, or none that kernels write.
    """
    format = BY_TORCH_NAME.get(str(name).removeprefix("torch."))
    if format is None or not format.writable:
        allowed = ", ".join(n for n, f in BY_TORCH_NAME.items() if f.writable)
        raise RecipeError(f"out_dtype {shown(name)} cannot be written; expected one of {allowed}")
    return format


def common_format(formats: Iterable[Format]) -> Format:
    """The promotion of the formats, else float32."""
    format = promote(formats)
    return format if format.writable else F32


def result_format(name: Any | None, views: Sequence[View]) -> Format:
    """The format asked for, else the inputs' common one."""
    if name is not None:
        return named_format(name)
    return common_format(BY_CODE[each.code] for each in views)


def empty_like(pattern: Any, shape: tuple[int, ...], format: Format) -> tuple[Any, View]:
    """A new array of the kind of ``pattern``, and its elements."""
    if isinstance(pattern, np.ndarray):
        dtype = np.uint16 if format is BF16 else np.dtype(str(format.torch_name))
        array = np.empty(shape, dtype)
        return array, view(array, format) if format is BF16 else view(array)
    import torch

    tensor = torch.empty(shape, dtype=getattr(torch, str(format.torch_name)))
    return tensor, view(tensor)


def bytes_of(array: Any) -> NDArray[np.uint8]:
    """The memory of a numpy array or torch tensor."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    import torch

    memory: NDArray[np.uint8] = array.reshape(-1).view(torch.uint8).numpy()
    return memory


def norm_of(diagonal: View) -> float:
    """The norm of a Fisher diagonal in host memory."""
    return float(np.sqrt(np.square(reference.value(diagonal), dtype=np.float64).sum()))


def triangle(array: Any, label: str) -> NDArray[np.float32]:
    """The lower triangle of a Gram matrix [inputs, inputs], row by row; one that is given as such
    stays as it is.

    :raises PymergeError: it is not square.
    """
    matrix = np.asarray(array, np.float32)
    if matrix.ndim == 1:
        return np.ascontiguousarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise PymergeError(
            f"{label} has shape {matrix.shape}, expected a Gram matrix [inputs, inputs]"
        )
    return matrix[np.tril_indices(len(matrix))]


def statistics_of(
    method: Method, given: Sequence[Any], shape: tuple[int, ...], num_models: int
) -> tuple[list[Any], list[View]]:
    """What was collected, as the lower triangles of Grams or as the views of diagonals.

    :raises PymergeError: something else is expected.
    """
    spec = method.spec
    if not given and method.reads is not None:
        what = "Gram matrix of the inputs" if method.reads == "gram" else "Fisher diagonal"
        raise PymergeError(
            f"merge_tensor: {spec.name} needs statistics=[...], each model's {what}; found none"
        )
    if not given:
        return [], []
    if method.reads is None or len(given) != num_models:
        expected = f"{num_models}" if method.reads else "none: the method reads none"
        raise PymergeError(
            f"merge_tensor: {spec.name} with {len(given)} statistics, expected {expected}"
        )
    labels = [f"merge_tensor: statistics[{index}]" for index in range(num_models)]
    if method.reads == "fisher":
        views = [array_view(array, label) for array, label in zip(given, labels, strict=True)]
        for array, label in zip(given, labels, strict=True):
            if tuple(array.shape) != shape:
                raise PymergeError(
                    f"{label} has shape {tuple(array.shape)}, expected {shape} as the tensors"
                )
        return [], views
    return [triangle(array, label) for array, label in zip(given, labels, strict=True)], []
