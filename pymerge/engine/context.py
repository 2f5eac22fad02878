"""What the tasks of one run share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pymerge.engine.blocks import BlockPool, Stopped
from pymerge.engine.events import Events
from pymerge.engine.gathered import Once
from pymerge.engine.matrices import HOST, Matrices
from pymerge.engine.output import Output
from pymerge.engine.sources import Sources
from pymerge.engine.updates import Updates
from pymerge.methods.protocol import Tile
from pymerge.ops.executor import make_executor
from pymerge.ops.view import View
from pymerge.plan import Job, Plan

#: Jobs in progress at once: while one computes, the next is read.
NUM_LANES = 3
#: Jobs with no more bytes of inputs are computed by their lane itself, one after the other: the
#: interpreter takes longer than the memory for them, and threads would only wait for each other.
SMALL_BYTES = 1 << 18
#: Small jobs that a lane takes at once.
GROUP = 64


class Context:
    """Plan, files, blocks and threads of one run.

    A task carries its tile through all three stages; there are ``readers`` more tasks than compute
    slots, so that some read or write while others compute.
    """

    def __init__(self, plan: Plan, sources: Sources, output: Output, events: Events) -> None:
        tiling = plan.tiling
        self.plan = plan
        self.sources = sources
        self.output = output
        self.events = events
        self.pool = BlockPool(tiling.block_bytes, tiling.num_blocks)
        self.executor = make_executor(
            plan.ops, tiling.threads, (self.pool.address, self.pool.num_bytes)
        )
        self.ops = self.executor.ops
        self._tasks = ThreadPoolExecutor(
            tiling.threads + tiling.readers, thread_name_prefix="pymerge-task"
        )
        # One tile beyond those the tasks carry waits its turn: more would only touch more memory.
        self._in_flight = threading.Semaphore(tiling.threads + tiling.readers + 1)
        self._slots = threading.Semaphore(self.executor.num_slots)
        self._on_host = HOST in self.executor.devices
        self._stopping = threading.Event()
        self.updates = Updates(self)
        self.once = Once()
        self.matrices = Matrices(self)

    def acquire_tile(self, count: int) -> list[int]:
        """Wait until another tile may pass through, and for its blocks.

        :raises Stopped: the run is ending.
        """
        self._in_flight.acquire()
        try:
            return self.pool.acquire(count)
        except Stopped:
            self._in_flight.release()
            raise

    def release_tile(self, blocks: list[int]) -> None:
        """Give back what :meth:`acquire_tile` gave."""
        self.pool.release(blocks)
        self._in_flight.release()

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue a task that owns its blocks; if it fails, nothing queued behind it starts."""
        return self._tasks.submit(self._run, task, *args)

    def run_now(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        """As :meth:`submit`, but in the calling thread, and done when it returns."""
        done: Future[Any] = Future()
        try:
            done.set_result(self._run(task, *args))
        except BaseException as error:
            done.set_exception(error)
        return done

    def is_small(self, job: Job) -> bool:
        """Whether handing a job's tiles to other threads costs more than they take: one tile of few
        bytes, in host memory, without matrices."""
        return (
            job.input_bytes <= SMALL_BYTES
            and not job.cost.num_bytes
            and not job.updates
            and self._on_host
        )

    def _run(self, task: Callable[..., Any], *args: Any) -> Any:
        try:
            return task(*args)
        except BaseException:
            self.stop()
            raise

    @contextmanager
    def here(
        self, tile: Tile, outputs: Sequence[View] = (), device: str | None = None
    ) -> Iterator[tuple[Tile, Sequence[View]]]:
        """The tile and its outputs in the memory of the ops, of one device where it is named."""
        with self.executor.here(tile.views, outputs, device) as (views, results):
            yield tile.at(views), results

    @contextmanager
    def computing(self, tensor: str, num_bytes: int) -> Iterator[None]:
        """Hold one of the compute slots."""
        with self._slots:
            if self._stopping.is_set():
                raise Stopped
            with self.events.stage("compute", tensor, num_bytes):
                yield

    def stop(self) -> None:
        """Let tasks in flight finish their stage and start nothing new."""
        self._stopping.set()
        self.pool.stop()
        self.matrices.stop()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def close(self) -> None:
        self._tasks.shutdown(wait=True)
        self.matrices.close()
        self.executor.close()
        self.sources.close()
