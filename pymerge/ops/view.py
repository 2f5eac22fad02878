"""Raw element memory as the kernels take it: an address, a format code and a count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymerge.errors import PymergeError
from pymerge.formats import BF16, BY_CODE, BY_TORCH_NAME, F8_E4M3, F8_E5M2, F16, F32, F64, Format

_BY_NUMPY_NAME = {"float64": F64, "float32": F32, "float16": F16}
# numpy has no dtype for these formats: they come as unsigned integers of the same size, named by
# the caller.
_BY_CARRIER = {"uint16": (BF16,), "uint8": (F8_E4M3, F8_E5M2)}


class View(NamedTuple):
    """``num`` elements of kernel format ``code`` at address ``ptr``.

    The memory may be misaligned even for its element size, and must stay alive while an op runs on
    it.
    """

    ptr: int
    code: int
    num: int

    def part(self, first: int, num: int) -> View:
        """``num`` of the elements, from index ``first`` on."""
        return View(self.ptr + first * BY_CODE[self.code].num_bytes, self.code, num)


class Buffer(NamedTuple):
    """Memory for ``view``, alive as long as ``owner`` is."""

    view: View
    owner: Any


def host_buffer(num: int, format: Format = F32) -> Buffer:
    """Uninitialised elements in host memory."""
    array = np.empty(max(1, num * format.num_bytes), np.uint8)
    assert format.code is not None
    return Buffer(View(array.ctypes.data, format.code, num), array)


def view(array: Any, format: Format | None = None) -> View:
    """The elements of a contiguous numpy array or CPU torch tensor, in memory order.

    numpy: float64, float32, float16; uint16 with ``format=BF16``, uint8 with ``format=F8_E4M3`` or
    ``F8_E5M2``. torch: any dtype the kernels read. Raises PymergeError for anything else.
    """
    if isinstance(array, np.ndarray):
        return _numpy_view(array, format)
    if hasattr(array, "data_ptr"):
        return _torch_view(array, format)
    raise PymergeError(
        f"view: expected a numpy array or a torch tensor, found {type(array).__name__}; "
        "make a View(ptr, code, num) for raw memory"
    )


def _numpy_view(array: np.ndarray[Any, Any], format: Format | None) -> View:
    name = array.dtype.name
    if not array.flags.c_contiguous:
        raise PymergeError(
            f"view: expected a contiguous array, found shape {array.shape} with strides "
            f"{array.strides}; pass numpy.ascontiguousarray(array)"
        )
    if not array.dtype.isnative:
        raise PymergeError(f"view: expected native byte order, found dtype {array.dtype.str}")
    if name in _BY_NUMPY_NAME:
        found = _BY_NUMPY_NAME[name]
        if format is not None and format != found:
            raise PymergeError(
                f"view: asked for {format.name}, but a {name} array holds {found.name}"
            )
    elif name in _BY_CARRIER:
        choices = _BY_CARRIER[name]
        if format not in choices:
            names = " or ".join(choice.name for choice in choices)
            given = "no format" if format is None else format.name
            raise PymergeError(f"view: a {name} array needs format={names}, found {given}")
        found = format
    else:
        raise PymergeError(
            "view: expected float64, float32, float16, uint16 (BF16) or uint8 (F8) elements, "
            f"found {name}"
        )
    assert found.code is not None
    return View(int(array.__array_interface__["data"][0]), found.code, int(array.size))


def _torch_view(tensor: Any, format: Format | None) -> View:
    name = str(tensor.dtype).removeprefix("torch.")
    found = BY_TORCH_NAME.get(name)
    if found is None or found.code is None:
        raise PymergeError(f"view: expected a floating-point tensor the kernels read, found {name}")
    if format is not None and format != found:
        raise PymergeError(f"view: asked for {format.name}, but a {name} tensor holds {found.name}")
    _check_plain(tensor)
    if not tensor.is_contiguous():
        raise PymergeError(
            f"view: expected a contiguous tensor, found shape {tuple(tensor.shape)} with strides "
            f"{tuple(tensor.stride())}; pass tensor.contiguous()"
        )
    return View(int(tensor.data_ptr()), found.code, int(tensor.numel()))


def _check_plain(tensor: Any) -> None:
    """Refuses tensors whose memory is elsewhere or is not their value.

    Quantised and complex tensors, which a conjugate bit makes another value, have no dtype that
    kernels read.
    """
    if tensor.device.type != "cpu":
        raise PymergeError(
            f"view: expected a tensor in CPU memory, found one on {tensor.device}; "
            "pass tensor.cpu()"
        )
    layout = str(tensor.layout).removeprefix("torch.")
    if layout != "strided":
        raise PymergeError(
            f"view: expected a dense tensor, found layout {layout}; pass tensor.to_dense()"
        )
    if tensor.is_neg():
        raise PymergeError(
            "view: expected a plain tensor, found one that is negated only when it is read; "
            "pass tensor.resolve_neg()"
        )
