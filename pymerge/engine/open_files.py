"""Room for the open files of a merge under the limit that the system sets for a process."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


@contextmanager
def room_for_files(num_files: int) -> Iterator[None]:
    """Raise the soft limit of this process by so many files, as far as the hard one lets, and give
    that back at the end.

    The limit belongs to the whole process: what several merges in its threads add sums up, and each
    takes away only its own share.
    """
    added = _raise_soft_limit(num_files)
    try:
        yield
    finally:
        _raise_soft_limit(-added)


def _raise_soft_limit(num_files: int) -> int:
    """Returns by how much the limit was raised."""
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or num_files == 0:
            return 0
        wanted = soft + num_files
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, 0), hard))
        return wanted - soft
