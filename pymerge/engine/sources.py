"""Positional reads from the source checkpoints, and the check that they did not change under us."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from pathlib import Path

from pymerge import _C
from pymerge.checkpoint import Header, TensorEntry
from pymerge.errors import StorageError

METHODS = ("dontcache", "direct", "buffered", "plain")


class Sources:
    """Open source files, each read by the best method that its filesystem offers.

    ``method`` forces one for all files.
    """

    def __init__(self, headers: Iterable[Header], method: str | None = None) -> None:
        self._headers = {header.path: header for header in headers}
        self._method = method
        self._files: dict[Path, _C.SourceFile] = {}
        self._lock = threading.Lock()
        self.methods: dict[str, str] = {}

    def read(
        self, entry: TensorEntry, first_byte: int, num_bytes: int, block: int, size: int
    ) -> int:
        """Read bytes of a tensor into a block; returns the address where they begin.

        :raises StorageError: the device failed or the file is shorter than its header says.
        """
        try:
            return self._open(entry.file).read(entry.offset + first_byte, num_bytes, block, size)
        except OSError as error:
            advice = (
                "the file was cut short after it was opened"
                if error.errno == errno.EIO and _is_short(entry)
                else "check the device or the network mount, then run the same command to continue"
            )
            raise StorageError(f"reading tensor {entry.name!r}: {error}; {advice}") from error

    def _open(self, path: Path) -> _C.SourceFile:
        with self._lock:
            opened = self._files.get(path)
            if opened is None:
                method, reason = (
                    (self._method, "asked for") if self._method else _C.probe_read_method(str(path))
                )
                self.methods[method] = reason
                opened = self._files[path] = _C.SourceFile(str(path), method)
            return opened

    def check_unchanged(self) -> None:
        """Compare size and modification time of every source with its header's.

        :raises StorageError: a file changed while it was being read.
        """
        for path, header in self._headers.items():
            try:
                now = path.stat()
            except OSError as error:
                raise StorageError(f"source {path} vanished during the merge: {error}") from error
            if (now.st_size, now.st_mtime_ns) != (header.file_bytes, header.mtime_ns):
                raise StorageError(
                    f"source {path} changed during the merge (size {header.file_bytes} → "
                    f"{now.st_size} bytes, or its modification time): the output would mix two "
                    "versions; merge again with --overwrite once the file is at rest"
                )

    def close(self) -> None:
        with self._lock:
            for opened in self._files.values():
                opened.close()
            self._files.clear()


def _is_short(entry: TensorEntry) -> bool:
    try:
        return entry.file.stat().st_size < entry.offset + entry.num_bytes
    except OSError:
        return False
