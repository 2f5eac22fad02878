"""What launching needs: the memory that kernels work on, scratch in it, block sizes, the launch.

On a GPU addresses are those of a device; kernels run on the stream that the thread has entered, or
else on torch's current one where the memory is, and scratch is torch's. In the interpreter
(TRITON_INTERPRET=1 when this module is imported) they are the host's and scratch is numpy's.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np
import triton
from numpy.typing import NDArray

from pymerge.errors import BackendError
from pymerge.formats import BY_CODE

INTERPRETED = bool(triton.knobs.runtime.interpret)

#: How kernels touch memory, told at compile time: byte by byte where an address is no multiple of
#: its element's size; element by element; or in vectors of 16 bytes, where addresses and the number
#: of elements are multiples of 16.
BYTES, ELEMENTS, VECTORS = 0, 1, 16

#: Elements of a program. None of the sizes was measured on a GPU: ``cuda`` gives each of 256
#: threads the 8 elements of a 16-byte vector of 16-bit formats. The interpreter pays for
#: operations, not for elements.
BLOCK = {"cuda": 2048, "interpreter": 65536}
NUM_WARPS = 8


class Elements(Protocol):
    """A View as the ops have it."""

    @property
    def ptr(self) -> int: ...
    @property
    def code(self) -> int: ...
    @property
    def num(self) -> int: ...


class Piece(NamedTuple):
    """Elements as a View has them."""

    ptr: int
    code: int
    num: int


def piece_of(v: Elements, first: int, num: int) -> Piece:
    """``num`` elements of a view, from index ``first`` on."""
    return Piece(v.ptr + first * BY_CODE[v.code].num_bytes, v.code, num)


class Scratch(NamedTuple):
    """Memory that kernels reach at ``address`` while this object is alive."""

    address: int
    owner: Any

    def numpy(self) -> NDArray[Any]:
        """The content, once the kernels before are done."""
        if INTERPRETED:
            return np.asarray(self.owner)
        return np.asarray(self.owner.cpu().numpy())


#: Answers the device and the stream's address that this thread has entered, or None; the ops room
#: sets it.
entered_place: Callable[[], tuple[int, int] | None] = lambda: None  # noqa: E731


class Room:
    """The memory that an op works on; entered, it is the place of scratch and launches.

    Scratch lives as long as the room, so that none is given back while a kernel uses it: an op
    reads a result before it leaves.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        self._stack = ExitStack()
        self._held: list[Scratch] = []

    def __enter__(self) -> Room:
        if INTERPRETED:
            return self
        import torch

        place = entered_place()
        index = device_of(self._address) if place is None else place[0]
        self._device = torch.device("cuda", index)
        self._stack.enter_context(torch.cuda.device(self._device))
        if place is not None and place[1] != torch.cuda.current_stream(index).cuda_stream:
            stream = torch.cuda.default_stream(index)
            if place[1]:
                stream = torch.cuda.ExternalStream(place[1], device=index)
            self._stack.enter_context(torch.cuda.stream(stream))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._held.clear()

    def finish(self) -> None:
        """Waits until the kernels are done: for ops that read no result."""
        if not INTERPRETED:
            import torch

            torch.cuda.current_stream(self._device).synchronize()

    def zeros(self, shape: int | tuple[int, ...], dtype: str) -> Scratch:
        """Zeros of a dtype that numpy and torch call by the same name."""
        if INTERPRETED:
            return self._holding(_scratch_of(np.zeros(shape, dtype)))
        import torch

        tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
        return self._holding(Scratch(tensor.data_ptr(), tensor))

    def upload(self, array: NDArray[Any]) -> Scratch:
        """A copy of a small array; copies of equal bytes are shared while they are recent."""
        array = np.ascontiguousarray(array)
        if INTERPRETED:
            return self._holding(_scratch_of(array))
        if array.nbytes > _SHARED_BYTES:
            return self.copy(array)
        key = (self._device.index, array.dtype.str, array.shape, array.tobytes())
        with _lock:
            found = _uploads.get(key)
            if found is None:
                found = _uploads[key] = self.copy(array)
                if len(_uploads) > _NUM_SHARED:
                    _uploads.popitem(last=False)
            _uploads.move_to_end(key)
        return self._holding(found)

    def copy(self, array: NDArray[Any]) -> Scratch:
        """A copy of an array for kernels to write to."""
        own = np.array(array, order="C")
        if INTERPRETED:
            return self._holding(_scratch_of(own))
        import torch

        tensor = torch.from_numpy(own).to(self._device)
        return self._holding(Scratch(tensor.data_ptr(), tensor))

    def _holding(self, scratch: Scratch) -> Scratch:
        self._held.append(scratch)
        return scratch


def _scratch_of(array: NDArray[Any]) -> Scratch:
    return Scratch(array.ctypes.data, array)


_SHARED_BYTES = 1 << 16
_NUM_SHARED = 256
_uploads: OrderedDict[Any, Scratch] = OrderedDict()
_lock = threading.RLock()
_launching = threading.RLock()


def device_of(address: int) -> int:
    """The ordinal of the device whose memory an address is in.

    :raises BackendError: it is not memory that the driver knows.
    """
    import torch

    torch.cuda.current_stream().query()  # makes the device's context this thread's
    ordinal = ctypes.c_int(-1)
    attribute = ctypes.c_int(9)  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuPointerGetAttribute(
        ctypes.byref(ordinal), attribute, ctypes.c_uint64(address)
    )
    if status != 0 or ordinal.value < 0:
        raise BackendError(
            f"triton: expected memory of a CUDA device, found address {address:#x}, which the "
            f"driver does not know (error {status}); copy the data to the device, or use the "
            "backend cpu for host memory"
        )
    return ordinal.value


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = NUM_WARPS,
    **constants: Any,
) -> None:
    """Runs a kernel without contraction of float32 products and sums; one thread at a time.

    Triton shows other threads a compiled kernel before it is loaded, so that they would launch
    nothing, and its interpreter patches triton.language while it runs.
    """
    constants |= {"num_warps": num_warps, "enable_fp_fusion": False}
    with _launching, np.errstate(all="ignore"):
        kernel[grid](*arguments, **constants)


def block_size(num: int) -> int:
    """Elements of a program of a map over ``num`` elements."""
    if not INTERPRETED:
        return BLOCK["cuda"]
    return min(power_of_two(max(num, 16)), BLOCK["interpreter"])


def power_of_two(num: int) -> int:
    """The smallest power of two that is not below ``num``."""
    return 1 << max(0, num - 1).bit_length()


def ceil_div(num: int, size: int) -> int:
    return -(-num // size)


def access_of(*views: Elements | None, period: int = 16) -> int:
    """How kernels may touch views, all of one count, whose rows begin at multiples of
    ``period``."""
    found = [v for v in views if v is not None]
    if any(v.ptr % BY_CODE[v.code].num_bytes for v in found):
        return BYTES
    if period % 16 or any(v.ptr % 16 or v.num % 16 for v in found):
        return ELEMENTS
    return VECTORS


def addresses(views: Sequence[Elements]) -> tuple[int, ...]:
    return shifted(v.ptr for v in views)


def shifted(addresses: Iterable[int]) -> tuple[int, ...]:
    """Addresses for a tuple: twice each, and one more.

    Triton compiles anew for each choice of members that are multiples of 16; these never are.
    Kernels know of alignment by ACCESS.
    """
    return tuple(address << 1 | 1 for address in addresses)


def codes(views: Sequence[Elements]) -> tuple[int, ...]:
    return tuple(v.code for v in views)


def code_or_none(v: Elements | None) -> int:
    """The format code, or -1 for no view."""
    return -1 if v is None else v.code


def address_or_none(v: Elements | None) -> int:
    return 0 if v is None else v.ptr
