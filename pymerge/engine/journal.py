"""The journal of an unfinished output folder: which tensors are on disk, so that a killed run
continues.

One JSON object a line:

1. ``{"plan": hash, "boot": id}`` opens the journal; a resume needs an equal plan hash.
2. ``{"tensor": name, "crc32c": hex, "nonfinite": n}`` follows once all bytes of a tensor were
   handed to the system; with ``parts`` and ``values`` where a method puts more beside it, and with
   ``warnings`` where it had some. A killed process loses nothing of that: the page cache survives
   it.
3. ``{"durable": n}`` follows once the bytes of the first n tensors are on the device. After a power
   loss (another boot id) only those count.

A last line that is torn, and anything after a line that cannot be read, does not count. The journal
is rewritten only by renaming a new one over it, so that there is never a moment without one; it is
rewritten before any file of the output is created or removed, so that it never speaks of bytes that
are gone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.errors import StorageError

NAME = ".pymerge-journal"
_FRESH_NAME = NAME + ".new"
#: Where the system does not tell one boot from another, every resume is as after a power loss.
UNKNOWN_BOOT = "unknown"


@dataclass(frozen=True)
class Record:
    """One finished tensor: checksum of its output bytes and its count of non-finite elements; the
    checksums of its parts and what was measured while they were written; what the method warned
    of."""

    crc32c: int
    nonfinite: int
    parts: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


class Found(NamedTuple):
    """What a journal tells: the plan of the unfinished merge, its tensors that are done, and the
    names of those whose bytes are on the device."""

    plan_hash: str | None
    records: dict[str, Record]
    durable: frozenset[str]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return UNKNOWN_BOOT


def _open_locked(path: Path) -> int:
    """Open and lock the file that ``path`` names now, not one that was replaced meanwhile.

    :raises StorageError: another process holds the lock, or there is no writing or locking here.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot write to the output folder {path.parent}: {error}"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.stat(path)
            if os.path.samestat(os.fstat(fd), found):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise StorageError(
                f"another pymerge is writing to {path.parent} at this moment; wait for it or "
                "choose another output folder"
            ) from error
        except FileNotFoundError:
            pass  # its owner finished between our two calls
        except OSError as error:
            os.close(fd)
            raise StorageError(
                f"cannot lock {path}: {error}; choose an output folder on a filesystem with locks"
            ) from error
        os.close(fd)


class Journal:
    """The open, locked journal of one output folder. Its owner calls it from one thread at a time.

    :raises StorageError: another process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.num_records = 0
        self._opening: dict[str, object] = {}
        self._held: list[bytes] | None = None
        self._fd = _open_locked(self.path)

    def read(self) -> Found:
        """What the last run left. Raises OSError."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
        plan_hash, boot, durable = None, "", 0
        tensors: list[tuple[str, Record]] = []
        for line in lines[:-1]:  # what follows the last newline is torn or empty
            try:
                entry = json.loads(line)
                if plan_hash is None:
                    plan_hash, boot = str(entry["plan"]), entry["boot"]
                elif "durable" in entry:
                    durable = int(entry["durable"])
                else:
                    tensors.append((str(entry["tensor"]), _record(entry)))
            except (ValueError, KeyError, TypeError, RecursionError):
                break
        if boot != _boot_id() or boot == UNKNOWN_BOOT:
            tensors = tensors[:durable]
        return Found(plan_hash, dict(tensors), frozenset(name for name, _ in tensors[:durable]))

    def begin(
        self, plan_hash: str, records: Mapping[str, Record], durable: Collection[str] = ()
    ) -> None:
        """Write the journal anew with what is known to be done, so that no torn line stays inside.

        ``durable`` names the tensors whose bytes are on the device; they keep their mark.

        :raises OSError: it cannot be written; the old one is untouched.
        """
        fresh = self.path.with_name(_FRESH_NAME)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        old, self._fd = self._fd, fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.num_records = 0
            self._opening = {"plan": plan_hash, "boot": _boot_id()}
            self._append(self._opening)
            kept = [name for name in records if name in durable]
            for name in kept + [name for name in records if name not in durable]:
                self.add(name, records[name])
            if kept:
                self._append({"durable": len(kept)})
            os.fsync(fd)
            os.replace(fresh, self.path)
        except BaseException:
            self._fd = old
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        os.close(old)

    def add(self, name: str, record: Record) -> None:
        """Record a tensor whose bytes were all written."""
        crc = f"{record.crc32c:08x}"
        entry: dict[str, object] = {"tensor": name, "crc32c": crc, "nonfinite": record.nonfinite}
        if record.parts:
            entry["parts"] = [f"{part:08x}" for part in record.parts]
            entry["values"] = record.values  # as text a float64 keeps its value
        if record.warnings:
            entry["warnings"] = record.warnings
        self._append(entry)
        self.num_records += 1

    def mark_durable(self, num_records: int) -> None:
        """Record that the bytes of the first ``num_records`` tensors are on the device."""
        self._append({"durable": num_records})
        self.write_held()
        os.fsync(self._fd)

    def hold(self) -> None:
        """Keep lines in memory until :meth:`write_held`; what they tell of may be lost meanwhile,
        and is done again then."""
        self._held = []

    def write_held(self, *, and_stop: bool = False) -> None:
        """Write the lines that were held, and with ``and_stop`` hold no more."""
        held, self._held = self._held, None if and_stop or self._held is None else []
        self._write(b"".join(held or ()))

    def distrust(self) -> None:
        """From now on only what was marked durable counts: the device lost bytes that were written.

        Overwrites the boot id in place, which needs no space.
        """
        other = {**self._opening, "boot": "-" * len(str(self._opening["boot"]))}
        os.pwrite(self._fd, _line(other), 0)

    def remove(self) -> None:
        """Delete the journal: the output is committed, or nothing of it is left."""
        self.path.with_name(_FRESH_NAME).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, entry: dict[str, object]) -> None:
        if self._held is not None:
            self._held.append(_line(entry))
        else:
            self._write(_line(entry))

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._fd, line) :]


def _record(entry: dict[str, Any]) -> Record:
    """Raises KeyError, TypeError or ValueError where the line is not one of ours."""
    return Record(
        int(entry["crc32c"], 16),
        int(entry["nonfinite"]),
        tuple(int(part, 16) for part in entry.get("parts", ())),
        tuple(float(value) for value in entry.get("values", ())),
        tuple(str(sentence) for sentence in entry.get("warnings", ())),
    )


def _line(entry: dict[str, object]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
