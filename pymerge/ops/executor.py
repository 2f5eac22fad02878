"""Where the ops of a merge work: on host memory itself, or on a device that tiles pass through.

On a device each compute slot has a stream and memory for one tile of its own: inputs are copied in,
the ops run, outputs are copied out, all in the order of the stream. While one slot computes, others
copy in either direction, and several devices share the tiles: no tile needs another, so there is
nothing to exchange between them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from pymerge.errors import BackendError
from pymerge.formats import BY_CODE, Format
from pymerge.ops import device
from pymerge.ops.opset import OpSet
from pymerge.ops.view import Buffer, View

#: Tiles on each device at once: one copied in, one computed, one copied out.
SLOTS_PER_DEVICE = 3
#: Pieces of scratch memory that a slot keeps when it needs another size.
MAX_SPARE = 4
#: Places of a device's buffer begin at a multiple of this.
ALIGNMENT = 256


#: Inputs and outputs of one tile.
Views = tuple[Sequence[View], Sequence[View]]


class Executor(Protocol):
    """What a merge asks of the place where its ops work."""

    ops: OpSet

    @property
    def num_slots(self) -> int:
        """How many tiles may be computed at once."""

    @property
    def devices(self) -> Sequence[str]:
        """Torch's names of the devices that the ops work on."""

    def here(
        self, inputs: Sequence[View], outputs: Sequence[View] = (), device: str | None = None
    ) -> AbstractContextManager[Views]:
        """A context that gives the inputs and outputs of a tile in the memory of the ops; when it
        ends, the outputs hold what the ops wrote there. ``device`` asks for one of the devices, for
        ops that work on matrices there."""

    def close(self) -> None:
        """Give back what the executor holds."""


class HostExecutor:
    """The ops work on host memory."""

    def __init__(self, ops: OpSet, threads: int) -> None:
        self.ops = ops
        self.num_slots = threads
        self.devices = ("cpu",)

    @contextmanager
    def here(
        self, inputs: Sequence[View], outputs: Sequence[View] = (), device: str | None = None
    ) -> Iterator[Views]:
        yield inputs, outputs

    def close(self) -> None:
        pass


class _Slot:
    """One stream of a device and the memory of a tile there, which grows with the tiles."""

    def __init__(self, owner: Any) -> None:
        self.device = owner
        self.stream = owner.stream()
        self._memory: Any = None
        self._spare: list[Any] = []

    def lease(self, num_bytes: int) -> _Lease:
        """Scratch memory. What was given back is used again: the stream runs in order, so whoever
        had it before is done with it when the next one's ops run."""
        for index, memory in enumerate(self._spare):
            if num_bytes <= memory.num_bytes <= 2 * num_bytes:
                return _Lease(self, self._spare.pop(index))
        del self._spare[: max(0, len(self._spare) - MAX_SPARE)]
        return _Lease(self, self.device.buffer(num_bytes))

    def take_back(self, memory: Any) -> None:
        """Keep scratch memory for the next one who needs as much."""
        self._spare.append(memory)

    def place(self, views: Sequence[View]) -> list[View]:
        """Device memory for each of the views; good until the next call."""
        ends, total = [], 0
        for view in views:
            ends.append(total)
            total += -(-_num_bytes(view) // ALIGNMENT) * ALIGNMENT
        if self._memory is None or self._memory.num_bytes < total:
            self._memory = None
            self._memory = self.device.buffer(max(total, ALIGNMENT))
        first = self._memory.ptr
        return [
            View(first + offset, view.code, view.num)
            for view, offset in zip(views, ends, strict=True)
        ]


class _Lease:
    """Scratch memory of a slot until it is dropped."""

    def __init__(self, slot: _Slot, memory: Any) -> None:
        self.memory = memory
        self._slot = slot

    def __del__(self) -> None:
        self._slot.take_back(self.memory)


class DeviceExecutor:
    """The ops work on devices; tiles pass through.

    ``pinned`` is the address and length of the host memory that tiles come from, where it is one
    piece: copies from pinned memory are faster and do not wait for the host.

    :raises BackendError: no device can be used.
    """

    def __init__(
        self, ops: OpSet, devices: Sequence[Any], pinned: tuple[int, int] | None = None
    ) -> None:
        if not devices:
            raise BackendError("expected a device for the ops of this plan, found none")
        self.ops = ops.allocating(self._allocate)
        self.num_slots = SLOTS_PER_DEVICE * len(devices)
        self._pinned = pinned
        self._pinning = devices[0]  # what is pinned for one is pinned for all
        self.devices = tuple(each.torch_name for each in devices)
        self._here = threading.local()
        self._slots = [_Slot(each) for each in devices for _ in range(SLOTS_PER_DEVICE)]
        self._freed = threading.Condition()
        if pinned is not None:
            try:
                self._pinning.register(*pinned)
            except BackendError as error:
                raise BackendError(
                    f"{error}; a merge on a device pins the memory that its tiles pass through: "
                    "give a smaller --memory, or --backend cpu"
                ) from error

    def _take(self, device: str | None) -> _Slot:
        """Wait for a slot, of the device where one is named."""
        with self._freed:
            while True:
                for index, slot in enumerate(self._slots):
                    if device is None or slot.device.torch_name == device:
                        return self._slots.pop(index)
                self._freed.wait()

    def _give_back(self, slot: _Slot) -> None:
        with self._freed:
            self._slots.append(slot)
            self._freed.notify_all()

    @contextmanager
    def here(
        self, inputs: Sequence[View], outputs: Sequence[View] = (), device: str | None = None
    ) -> Iterator[Views]:
        slot = self._take(device)
        try:
            with slot.stream:
                self._here.slot = slot
                different = list(dict.fromkeys(inputs))
                places = slot.place([*different, *outputs])
                moved = dict(zip(different, places, strict=False))
                for host, there in moved.items():
                    slot.stream.copy_in(there.ptr, host.ptr, _num_bytes(host))
                results = places[len(different) :]
                yield [moved[host] for host in inputs], results
                for host, there in zip(outputs, results, strict=True):
                    slot.stream.copy_out(host.ptr, there.ptr, _num_bytes(host))
                slot.stream.synchronize()
        except BaseException:
            # Host memory of the tile is about to be given back: no copy may still be under way.
            with suppress(BackendError):
                slot.stream.synchronize()
            raise
        finally:
            self._here.slot = None
            self._give_back(slot)

    def _allocate(self, num: int, format: Format) -> Buffer:
        lease = self._here.slot.lease(max(ALIGNMENT, num * format.num_bytes))
        assert format.code is not None
        return Buffer(View(lease.memory.ptr, format.code, num), lease)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinning.unregister(*self._pinned)
        self._slots.clear()


class ResidentExecutor(DeviceExecutor):
    """The ops work on one device, on tensors that lie there already: nothing is copied."""

    @contextmanager
    def here(
        self, inputs: Sequence[View], outputs: Sequence[View] = (), device: str | None = None
    ) -> Iterator[Views]:
        slot = self._take(device)
        try:
            with slot.stream:
                self._here.slot = slot
                try:
                    yield inputs, outputs
                finally:
                    slot.stream.synchronize()
        finally:
            self._here.slot = None
            self._give_back(slot)


def make_executor(ops: OpSet, threads: int, pinned: tuple[int, int] | None = None) -> Executor:
    """The executor for the memory that the ops work on.

    :raises BackendError: they work on a device and there is none.
    """
    for backend in dict.fromkeys(ops.backends.values()):
        if device.memory_of(backend) == "device":
            return DeviceExecutor(ops, device.devices_for(backend), pinned)
    return HostExecutor(ops, threads)


def make_resident_executor(ops: OpSet, torch_device: str) -> Executor:
    """The executor for tensors in the memory of one device, by torch's name of it.

    :raises BackendError: the ops do not work there.
    """
    for backend in dict.fromkeys(ops.backends.values()):
        if device.memory_of(backend) == "device":
            found = [d for d in device.devices_for(backend) if d.torch_name == torch_device]
            if found:
                return ResidentExecutor(ops, found)
    reasons = {f"{name}: {why}" for each in ops.reasons.values() for name, why in each.items()}
    raise BackendError(
        f"the tensors are on {torch_device}, the ops of this merge run on "
        f"{', '.join(sorted(set(ops.backends.values())))}"
        f"{': ' + '; '.join(sorted(reasons)) if reasons else ''}; move the tensors to the CPU, or "
        "install a backend for that device"
    )


def _num_bytes(view: View) -> int:
    return view.num * BY_CODE[view.code].num_bytes
