"""Workspaces for the jobs that compute with whole matrices, and what they keep between looks at the
whole model.

On the host all jobs share one workspace and take their bytes from the plan's room for matrices; on
devices a job has one device's workspace to itself.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pymerge.engine.blocks import Stopped
from pymerge.errors import StorageError
from pymerge.ops.workspace import Workspace
from pymerge.plan import Job

if TYPE_CHECKING:
    from pymerge.engine.context import Context

HOST = "cpu"

#: Number of glibc's option, and from which size on it asks the system for a block's memory and
#: gives it back with the block. Left alone it raises the size to 32 MiB as blocks are freed, and
#: matrices leave holes in the heaps of all threads.
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 4 << 20


class Matrices:
    """The workspaces of one run, made when the first job asks for one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._room = context.plan.tiling.matrix_bytes
        self._shared = HOST in context.executor.devices
        self._used = 0
        self._condition = threading.Condition()
        self._free: list[Workspace] | None = None
        self._all: list[Workspace] = []
        self.store = Spill(context)

    @contextmanager
    def hold(self, job: Job) -> Iterator[Workspace | None]:
        """A workspace with room for the job's matrices, until the context ends; None for a job
        without.

        Called by threads that hold no blocks.

        :raises Stopped: the run is ending.
        """
        if not job.cost.num_bytes:
            yield None
            return
        workspace = self._acquire(job)
        try:
            yield workspace
        finally:
            self._release(job, workspace)

    def _acquire(self, job: Job) -> Workspace:
        size = job.cost.num_bytes
        with self._condition:
            if self._free is None:
                self._free = self._make()
            while True:
                self._check()
                if not self._shared and self._free:
                    return self._free.pop()
                if self._shared and (self._used + size <= self._room or not self._used):
                    self._used += size
                    return self._free[0]
                self._condition.wait()

    def _release(self, job: Job, workspace: Workspace) -> None:
        with self._condition:
            if self._shared:
                self._used -= job.cost.num_bytes
            elif self._free is not None:
                self._free.append(workspace)
            self._condition.notify_all()

    def _make(self) -> list[Workspace]:
        """One workspace for the host, or one for each device."""
        devices = self._context.executor.devices
        threads = self._context.plan.tiling.matrix_threads
        if self._shared:
            _give_back_freed_memory()
            self._all = [Workspace(threads, HOST, self._check)]
        else:
            self._all = [Workspace(1, device, self._check) for device in devices]
        return list(self._all)

    def _check(self) -> None:
        if self._context.stopping:
            raise Stopped

    def stop(self) -> None:
        """Wake every waiter, who then gives up."""
        with self._condition:
            self._condition.notify_all()

    def close(self) -> None:
        for workspace in self._all:
            workspace.close()
        self.store.close()


def _give_back_freed_memory() -> None:
    """Matrices are mapped one by one from now on, in the whole process; where the C library is
    another than glibc nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


class Spill:
    """A scratch file in the output folder for arrays that a model-wide measurement keeps.

    It has no name: whatever ends the run, it is gone.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._file: Any = None
        self._places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        self._end = 0
        self._lock = threading.Lock()

    @property
    def _folder(self) -> Path:
        return self._context.output.folder

    def put(self, name: str, array: NDArray[np.generic]) -> None:
        """Keep an array.

        :raises StorageError: there is no space for it.
        """
        data = np.ascontiguousarray(array)
        with self._lock:
            offset, self._end = self._end, self._end + data.nbytes
            self._places[name] = (offset, data.dtype, data.shape)
        try:
            with self._lock:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            rest = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while rest:
                done = os.pwrite(self._file.fileno(), rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            raise StorageError(
                f"cannot keep the matrix of {name!r} in {self._folder}: {error}; the method keeps "
                "one number in float32 for each element of the merged matrices until the end: "
                "make room, then run the same command again"
            ) from error

    def get(self, name: str) -> NDArray[np.generic]:
        """The array that was kept.

        :raises StorageError: it cannot be read.
        """
        offset, dtype, shape = self._places[name]
        array = np.empty(shape, dtype)
        rest = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            while rest:
                done = os.preadv(self._file.fileno(), [rest], offset)
                if done == 0:
                    raise OSError("it ends too early")
                rest, offset = rest[done:], offset + done
        except OSError as error:
            raise StorageError(f"cannot read what was kept of {name!r}: {error}") from error
        return array

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
