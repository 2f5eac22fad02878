"""The journal of an unfinished output folder: which tensors are on disk, so that a killed run
continues.

One JSON object a line:

1. ``{"plan": hash, "boot": id}`` opens the journal; a resume needs an equal plan hash.
2. ``{"tensor": name, "crc32c": hex, "nonfinite": n}`` follows once all bytes of a tensor were
   handed to the system. A killed process loses nothing of that: the page cache survives it.
3. ``{"durable": n}`` follows once the bytes of the first n tensors are on the device. After a power
   loss (another boot id) only those count.

A last line that is torn, and anything after a line that cannot be read, does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pymerge.errors import StorageError

NAME = ".pymerge-journal"


@dataclass(frozen=True)
class Record:
    """One finished tensor: checksum of its output bytes and its count of non-finite elements."""

    crc32c: int
    nonfinite: int


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


class Journal:
    """The open, locked journal of one output folder. Its owner calls it from one thread at a time.

    :raises StorageError: another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.num_records = 0
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"cannot write to the output folder {folder}: {error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise StorageError(
                f"another pymerge is writing to {folder} at this moment; wait for it or "
                "choose another "
                "output folder"
            ) from error

    def read(self) -> tuple[str | None, dict[str, Record]]:
        """The plan hash of the unfinished merge, or None, and its finished tensors."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
        entries = []
        for line in lines[:-1]:  # what follows the last newline is torn or empty
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        if not entries or "plan" not in entries[0]:
            return None, {}
        tensors = [entry for entry in entries if "tensor" in entry]
        if entries[0].get("boot") != _boot_id():
            marks = [int(entry["durable"]) for entry in entries if "durable" in entry]
            tensors = tensors[: marks[-1] if marks else 0]
        records = {
            entry["tensor"]: Record(int(entry["crc32c"], 16), int(entry["nonfinite"]))
            for entry in tensors
        }
        return str(entries[0]["plan"]), records

    def begin(self, plan_hash: str, records: dict[str, Record]) -> None:
        """Write the journal anew with what is known to be done, so that no torn line stays."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.num_records = 0
        self._append({"plan": plan_hash, "boot": _boot_id()})
        for name, record in records.items():
            self.add(name, record)

    def add(self, name: str, record: Record) -> None:
        """Record a tensor whose bytes were all written."""
        crc = f"{record.crc32c:08x}"
        self._append({"tensor": name, "crc32c": crc, "nonfinite": record.nonfinite})
        self.num_records += 1

    def mark_durable(self, num_records: int) -> None:
        """Record that the bytes of the first ``num_records`` tensors are on the device."""
        self._append({"durable": num_records})
        os.fsync(self._fd)

    def remove(self) -> None:
        """Delete the journal: the output is committed, or nothing of it is left."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, entry: dict[str, object]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
