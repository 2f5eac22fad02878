"""Devices that a backend's ops work on: memory there, copies to and from it, streams.

A stream orders the work given to it. Inside ``with stream:`` the ops that this thread calls run on
it; elsewhere they run on torch's current stream where torch has begun to use CUDA, and otherwise
on the default stream of device 0. Without a GPU - an emulator, or Triton's interpreter - the one
device is the host: its memory is host memory, its copies are memmove.

Nothing heavy is imported before it is needed: this module imports where torch, Triton and CUDA are
missing.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

from pymerge.errors import BackendError

_thread = threading.local()

#: Compute capability below which the kernels do not run.
LEAST_CAPABILITY = (8, 0)


class Place(NamedTuple):
    """Where ops run: the index of a device and the address of a stream there, 0 for its default."""

    device: int
    stream: int


def memory_of(backend: str) -> str:
    """Where a backend's ops find their memory: ``host`` or ``device``.

    An emulated device counts as one: its ops take host memory, and a merge that uses it goes the
    way of a device.
    """
    return "device" if backend in ("cuda", "triton") else "host"


def current_place() -> Place | None:
    """The stream that this thread entered, else torch's current one where torch uses CUDA, else
    None."""
    entered: list[Place] = getattr(_thread, "entered", [])
    if entered:
        return entered[-1]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        index = torch.cuda.current_device()
        return Place(index, torch.cuda.current_stream(index).cuda_stream)
    return None


def may_have_gpu() -> bool:
    """Whether it is worth asking CUDA: a look at files, which loads nothing.

    The devices are there wherever NVIDIA's driver is loaded, in containers too, but not under WSL.
    """
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvidia0"))


def emulates_cuda() -> bool:
    """Whether PYMERGE_CUDA_EMULATE asks for the emulator of the cuda backend."""
    return _flag("PYMERGE_CUDA_EMULATE")


def interprets_triton() -> bool:
    """Whether TRITON_INTERPRET makes Triton run on the host."""
    return _flag("TRITON_INTERPRET")


def _flag(name: str) -> bool:
    return os.environ.get(name) == "1"


class Buffer:
    """``num_bytes`` of uninitialised device memory at ``ptr``, freed with this object."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self.ptr, self._owner = device._allocate(num_bytes)

    def close(self) -> None:
        """Gives the memory back now."""
        if self.ptr:
            ptr, self.ptr = self.ptr, 0
            self._device._release(ptr, self._owner)
            self._owner = None

    def __del__(self) -> None:
        if getattr(self, "ptr", 0) and not sys.is_finalizing():
            self.close()


class Stream:
    """A queue of copies and kernels on one device; ``with stream:`` makes it this thread's own."""

    def __init__(self, device: Device, address: int, owner: Any = None) -> None:
        self.device = device
        self.address = address
        self._owner = owner
        self._entered: list[ExitStack] = []

    @property
    def place(self) -> Place:
        return Place(self.device.index, self.address)

    def copy_in(self, dst: int, src: int, num_bytes: int) -> None:
        """Copies host memory to the device; returns at once where the host memory is registered."""
        self.device._copy(self, dst, src, num_bytes, to_device=True)

    def copy_out(self, dst: int, src: int, num_bytes: int) -> None:
        """Copies device memory to the host: there when the stream has been synchronised."""
        self.device._copy(self, dst, src, num_bytes, to_device=False)

    def synchronize(self) -> None:
        """Waits until everything given to the stream is done; raises BackendError if it failed."""
        self.device._synchronize(self)

    def wait_for(self, other: Stream) -> None:
        """What is given to this stream from now on begins after what ``other`` has so far."""
        self.device._wait_for(self, other)

    def __enter__(self) -> Stream:
        stack = ExitStack()
        self.device._enter(self, stack)
        entered: list[Place] = getattr(_thread, "entered", [])
        entered.append(self.place)
        _thread.entered = entered
        self._entered.append(stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _thread.entered.pop()
        self._entered.pop().close()

    def __del__(self) -> None:
        if self.address and self._owner is None and not sys.is_finalizing():
            self.device._destroy(self)


class Device:
    """One device. Its methods may be called from any thread."""

    name: str = ""
    index: int = 0
    #: Torch's name of it.
    torch_name: str = "cpu"

    @property
    def total_memory(self) -> int:
        """Bytes of memory that the device has."""
        return self._memory()[1]

    @property
    def free_memory(self) -> int:
        """Bytes of it that nobody uses now."""
        return self._memory()[0]

    def buffer(self, num_bytes: int) -> Buffer:
        """Device memory. Raises BackendError where there is not enough."""
        return Buffer(self, num_bytes)

    def register(self, ptr: int, num_bytes: int) -> None:
        """Pins host memory, so that copies of it go at full speed beside other work."""

    def unregister(self, ptr: int, num_bytes: int) -> None:
        """Undoes :meth:`register`."""

    def stream(self) -> Stream:
        """A new stream of this device."""
        raise NotImplementedError

    def _memory(self) -> tuple[int, int]:
        raise NotImplementedError

    def _allocate(self, num_bytes: int) -> tuple[int, Any]:
        """The address and, where the memory belongs to an object, that object."""
        raise NotImplementedError

    def _release(self, ptr: int, owner: Any) -> None:
        pass

    def _copy(self, stream: Stream, dst: int, src: int, num_bytes: int, *, to_device: bool) -> None:
        raise NotImplementedError

    def _synchronize(self, stream: Stream) -> None:
        pass

    def _wait_for(self, stream: Stream, other: Stream) -> None:
        pass

    def _enter(self, stream: Stream, stack: ExitStack) -> None:
        pass

    def _destroy(self, stream: Stream) -> None:
        pass


class HostDevice(Device):
    """The host in the part of a device: for the emulator and for Triton's interpreter."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stream(self) -> Stream:
        return Stream(self, 0)

    def _memory(self) -> tuple[int, int]:
        from pymerge.machine import available_memory, total_memory

        return available_memory(), total_memory()

    def _allocate(self, num_bytes: int) -> tuple[int, Any]:
        memory = ctypes.create_string_buffer(max(1, num_bytes) + 255)
        address = ctypes.addressof(memory)
        return -(-address // 256) * 256, memory

    def _copy(self, stream: Stream, dst: int, src: int, num_bytes: int, *, to_device: bool) -> None:
        ctypes.memmove(dst, src, num_bytes)


class CudaDevice(Device):
    """A GPU through the runtime of ``pymerge._cuda``."""

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime = runtime
        self.index = index
        self.torch_name = f"cuda:{index}"
        self.name = runtime.device_info(index)["name"]

    def stream(self) -> Stream:
        return Stream(self, self._runtime.make_stream(self.index))

    def register(self, ptr: int, num_bytes: int) -> None:
        self._runtime.register_host(ptr, num_bytes)

    def unregister(self, ptr: int, num_bytes: int) -> None:
        self._runtime.unregister_host(ptr)

    def _memory(self) -> tuple[int, int]:
        info = self._runtime.device_info(self.index)
        return info["free_bytes"], info["total_bytes"]

    def _allocate(self, num_bytes: int) -> tuple[int, Any]:
        return self._runtime.allocate(self.index, max(1, num_bytes)), None

    def _release(self, ptr: int, owner: Any) -> None:
        self._runtime.release(self.index, ptr)

    def _copy(self, stream: Stream, dst: int, src: int, num_bytes: int, *, to_device: bool) -> None:
        self._runtime.copy(stream.place, dst, src, num_bytes)

    def _synchronize(self, stream: Stream) -> None:
        self._runtime.synchronize(stream.place)

    def _wait_for(self, stream: Stream, other: Stream) -> None:
        self._runtime.wait_for(stream.place, other.place)

    def _enter(self, stream: Stream, stack: ExitStack) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            external = torch.cuda.ExternalStream(stream.address, device=self.index)
            stack.enter_context(torch.cuda.stream(external))

    def _destroy(self, stream: Stream) -> None:
        self._runtime.destroy_stream(stream.place)


class TorchDevice(Device):
    """A GPU through torch: for Triton, which takes torch's current stream."""

    def __init__(self, torch: Any, index: int) -> None:
        self._torch = torch
        self.index = index
        self.torch_name = f"cuda:{index}"
        self.name = torch.cuda.get_device_name(index)

    def stream(self) -> Stream:
        own = self._torch.cuda.Stream(device=self.index)
        return Stream(self, own.cuda_stream, own)

    def register(self, ptr: int, num_bytes: int) -> None:
        portable = 1
        self._check(
            self._torch.cuda.cudart().cudaHostRegister(ptr, num_bytes, portable),
            f"cudaHostRegister of {num_bytes} bytes",
        )

    def unregister(self, ptr: int, num_bytes: int) -> None:
        self._check(self._torch.cuda.cudart().cudaHostUnregister(ptr), "cudaHostUnregister")

    def _memory(self) -> tuple[int, int]:
        free, total = self._torch.cuda.mem_get_info(self.index)
        return int(free), int(total)

    def _allocate(self, num_bytes: int) -> tuple[int, Any]:
        torch = self._torch
        try:
            memory = torch.empty(max(1, num_bytes), dtype=torch.uint8, device=self._torch_device())
        except torch.cuda.OutOfMemoryError as error:
            raise BackendError(f"{num_bytes} bytes on GPU {self.index}: {error}") from error
        # Torch would hand freed memory to its own stream while another still works on it.
        torch.cuda.current_stream(self.index).synchronize()
        return int(memory.data_ptr()), memory

    def _release(self, ptr: int, owner: Any) -> None:
        self._torch.cuda.synchronize(self.index)

    def _copy(self, stream: Stream, dst: int, src: int, num_bytes: int, *, to_device: bool) -> None:
        if not num_bytes:
            return
        torch = self._torch
        host_ptr, device_ptr = (src, dst) if to_device else (dst, src)
        host = torch.frombuffer(
            (ctypes.c_uint8 * num_bytes).from_address(host_ptr), dtype=torch.uint8
        )
        there = torch.as_tensor(_Bytes(device_ptr, num_bytes), device=self._torch_device())
        with torch.cuda.stream(stream._owner):
            if to_device:
                there.copy_(host, non_blocking=True)
            else:
                host.copy_(there, non_blocking=True)

    def _synchronize(self, stream: Stream) -> None:
        try:
            stream._owner.synchronize()
        except RuntimeError as error:
            raise BackendError(f"GPU {self.index}: {error}") from error

    def _wait_for(self, stream: Stream, other: Stream) -> None:
        stream._owner.wait_stream(other._owner)

    def _enter(self, stream: Stream, stack: ExitStack) -> None:
        stack.enter_context(self._torch.cuda.stream(stream._owner))

    def _torch_device(self) -> Any:
        return self._torch.device("cuda", self.index)

    def _check(self, status: Any, what: str) -> None:
        if int(status) != 0:
            raise BackendError(f"{what} on GPU {self.index}: CUDA error {int(status)}")


class _Bytes:
    """Raw device memory in the form that torch takes without copying."""

    def __init__(self, ptr: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (ptr, False),
            "strides": None,
            "version": 3,
        }


def devices_for(backend: str) -> list[Device]:
    """The devices that a backend's ops can work on, all visible GPUs that are new enough, or the
    host in their place.

    :raises BackendError: the backend has no devices, or none can be used here.
    """
    if backend == "cuda":
        if emulates_cuda():
            return [HostDevice("emulated on the host")]
        runtime = importlib.import_module("pymerge.ops.cuda").runtime()
        # Beside a device that the kernels are built for there may be an older one.
        return [
            CudaDevice(runtime, index)
            for index in range(runtime.num_devices())
            if runtime.device_info(index)["capability"] >= LEAST_CAPABILITY
        ]
    if backend == "triton":
        if interprets_triton():
            return [HostDevice("interpreted on the host")]
        torch = importlib.import_module("torch") if may_have_gpu() else None
        if torch is None or not torch.cuda.is_available():
            raise BackendError("triton: torch sees no GPU")
        return [TorchDevice(torch, index) for index in range(torch.cuda.device_count())]
    raise BackendError(f"backend {backend} works on host memory and has no devices")
