"""The byte budget: a pool of equal blocks in one arena.

Blocks are the only memory that tensor data occupies, so the budget holds by construction. They are
reused last in, first out: a block that was touched already costs no page faults.
"""

from __future__ import annotations

import threading
from collections import deque

from pymerge import _C
from pymerge.errors import PlanError


class Stopped(Exception):
    """The run is ending; whoever waits for blocks or tasks gives up."""


class BlockPool:
    """Hands out blocks by address; requests are served in the order they were made.

    :raises PlanError: the system does not give that much memory.
    """

    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        try:
            self._arena = _C.Arena(block_bytes * num_blocks)
        except OSError as error:
            raise PlanError(
                f"the system does not give {block_bytes * num_blocks:,} bytes of memory: {error}; "
                "give a smaller --memory"
            ) from error
        first = self._arena.address
        self._free = [first + index * block_bytes for index in reversed(range(num_blocks))]
        self._turn: deque[object] = deque()
        self._condition = threading.Condition()
        self._stopped = False

    def acquire(self, count: int) -> list[int]:
        """Wait for ``count`` blocks and take them at once.

        :raises Stopped: the pool was stopped meanwhile.
        """
        if count > self.num_blocks:
            raise ValueError(f"{count} blocks asked for, the pool has {self.num_blocks}")
        ticket = object()
        with self._condition:
            self._turn.append(ticket)
            while not self._stopped and (self._turn[0] is not ticket or len(self._free) < count):
                self._condition.wait()
            self._turn.remove(ticket)
            self._condition.notify_all()
            if self._stopped:
                raise Stopped
            taken = self._free[len(self._free) - count :]
            del self._free[len(self._free) - count :]
            return taken

    def release(self, blocks: list[int]) -> None:
        with self._condition:
            self._free.extend(blocks)
            self._condition.notify_all()

    def stop(self) -> None:
        """Wake every waiter with :class:`Stopped`."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    @property
    def address(self) -> int:
        """Where the arena begins."""
        return self._arena.address

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)
