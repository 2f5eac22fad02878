"""Small tensors are written together: bytes that lie one after the other in one write, and then the
journal's lines of their jobs in one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pymerge.engine.events import Events
from pymerge.engine.journal import Record
from pymerge.engine.output import Output
from pymerge.errors import PymergeError
from pymerge.plan import Job, Part

#: Bytes that wait for those that follow them.
BATCH_BYTES = 1 << 18


class Batch:
    """What the jobs of a group have written and finished, held until :meth:`flush`. One lane uses
    it at a time."""

    def __init__(self, output: Output, events: Events) -> None:
        self._output = output
        self._events = events
        self._memory = ctypes.create_string_buffer(BATCH_BYTES)
        self._place: Job | Part | None = None
        self._first = self._end = 0
        self._finished: list[tuple[Job, Record]] = []

    def write(self, place: Job | Part, first_byte: int, address: int, num_bytes: int) -> None:
        """As :meth:`Output.write`, later.

        :raises StorageError: the device is full or failed.
        """
        offset = place.offset + first_byte
        follows = self._place is not None and (self._place.shard, self._end) == (
            place.shard,
            offset,
        )
        if not follows or self._end - self._first + num_bytes > BATCH_BYTES:
            self._write()
        if num_bytes > BATCH_BYTES:
            self._output.write(place, first_byte, address, num_bytes)
            return
        if self._place is None:
            self._place, self._first = place, offset
        start = ctypes.addressof(self._memory) + offset - self._first
        ctypes.memmove(start, address, num_bytes)
        self._end = offset + num_bytes

    def finish(self, job: Job, record: Record) -> bool:
        """As :meth:`Output.finish`, later; counts the tensors by itself.

        :returns: False.
        """
        self._finished.append((job, record))
        return False

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """Flush at the end, also where it is a failure: what is finished can then be resumed.

        :raises StorageError: the device is full or failed.
        """
        try:
            yield
        except BaseException:
            with suppress(PymergeError):
                self.flush()
            raise
        self.flush()

    def flush(self) -> None:
        """Write and journal what was held.

        :raises StorageError: the device is full or failed.
        """
        self._write()
        finished, self._finished = self._finished, []
        with self._output.journal_together():
            for job, record in finished:
                if self._output.finish(job, record):
                    self._events.tensor_done()

    def _write(self) -> None:
        place, self._place = self._place, None
        if place is None:
            return
        address, num_bytes = ctypes.addressof(self._memory), self._end - self._first
        try:
            self._output.write(place, self._first - place.offset, address, num_bytes)
        except BaseException:
            self._finished.clear()  # the bytes of some of them are lost
            raise
