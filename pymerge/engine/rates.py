"""How fast this machine's storage and memory move bytes: the floor that no merge can beat.

Rates are measured on a scratch file in the folder that will be written, once, and kept in the
user's cache for a week; ``pymerge plan`` and ``pymerge doctor`` measure, a merge only looks them
up.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pymerge import _C
from pymerge.cache import cache_folder
from pymerge.checkpoint import stored_entries
from pymerge.errors import StorageError
from pymerge.plan import Plan

PROBE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
KEEP_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Rates:
    """Bytes a second: from the device, from the page cache, to the device, and within memory."""

    read: float
    cached_read: float
    write: float
    copy: float


def measure_rates(folder: Path) -> Rates:
    """Measure on a scratch file of 64 MiB in ``folder`` (removed at once) and remember.

    :raises StorageError: the folder cannot be written.
    """
    try:
        arena = _C.Arena(2 * (BLOCK_BYTES + 8192))
        with tempfile.TemporaryDirectory(prefix=".pymerge-rates-", dir=folder) as scratch:
            path = os.path.join(scratch, "probe")
            _copy_seconds(arena, PROBE_BYTES)  # touch the memory once
            copy = _copy_seconds(arena, PROBE_BYTES)
            write = _write_seconds(path, arena)
            _read_seconds(path, arena, "plain")  # now the page cache holds it
            cached = _read_seconds(path, arena, "plain")
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            method, _ = _C.probe_read_method(path)
            device = _read_seconds(path, arena, method)
    except OSError as error:
        raise StorageError(f"cannot measure the storage in {folder}: {error}") from error
    rates = Rates(*(PROBE_BYTES / seconds for seconds in (device, cached, write, copy)))
    _remember(folder, rates)
    return rates


def known_rates(folder: Path) -> Rates | None:
    """The remembered rates of the filesystem that holds ``folder``, if not older than a week."""
    try:
        entry = json.loads(_cache_path(folder).read_text())
        if time.time() - entry["measured_at"] > KEEP_SECONDS:
            return None
        return Rates(**entry["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def floor_seconds(plan: Plan, rates: Rates) -> float:
    """Seconds that storage alone needs: read every source byte once, write the output.

    Bytes of the sources that the page cache holds now are read at its rate; where the system does
    not tell, as for files of another user, they count as not cached.
    """
    seconds = plan.bytes_written / rates.write
    wanted: dict[Path, int] = {}
    for job in plan.jobs:
        for entry in (stored for source in job.sources for stored in stored_entries(source)):
            wanted[entry.file] = wanted.get(entry.file, 0) + entry.num_bytes
    for path, num_bytes in wanted.items():
        share = _cached_share(path)
        seconds += num_bytes * (share / rates.cached_read + (1 - share) / rates.read)
    return seconds


def rates_of(folder: Path) -> Rates | None:
    """The rates of the storage that holds ``folder``, measured if they are not known; None where it
    cannot be written."""
    try:
        place = existing_parent(folder)
        return known_rates(place) or measure_rates(place)
    except StorageError:
        return None


def known_floor(plan: Plan, folder: Path) -> float | None:
    """The floor by remembered rates, None where this filesystem was not measured.

    :raises StorageError: the system does not let us look for the folder.
    """
    rates = known_rates(existing_parent(folder))
    return None if rates is None else floor_seconds(plan, rates)


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists.

    :raises StorageError: the system does not let us look, as for a name that is too long.
    """
    try:
        found = folder.absolute()
        while not found.exists():
            found = found.parent
    except OSError as error:
        raise StorageError(
            f"cannot look for the folder {folder}: {error}; choose another folder"
        ) from error
    return found


def _cached_share(path: Path) -> float:
    try:
        return _C.cached_fraction(str(path))
    except OSError:
        return 0.0


def _cache_path(folder: Path) -> Path:
    return cache_folder() / "rates" / f"{os.stat(folder).st_dev:x}.json"


def _remember(folder: Path, rates: Rates) -> None:
    path = _cache_path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"measured_at": time.time(), "rates": asdict(rates)})
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        return  # a home that cannot be written costs only the memory of this measurement


def _copy_seconds(arena: _C.Arena, num_bytes: int) -> float:
    begin = time.perf_counter()
    for _ in range(num_bytes // BLOCK_BYTES):
        _C.copy(arena.address + BLOCK_BYTES + 8192, arena.address, BLOCK_BYTES)
    return time.perf_counter() - begin


def _write_seconds(path: str, arena: _C.Arena) -> float:
    shard = _C.ShardFile(path, PROBE_BYTES, drop_cache=True)
    begin = time.perf_counter()
    for offset in range(0, PROBE_BYTES, BLOCK_BYTES):
        shard.write(offset, arena.address, BLOCK_BYTES)
    shard.sync()
    seconds = time.perf_counter() - begin
    shard.close()
    return seconds


def _read_seconds(path: str, arena: _C.Arena, method: str) -> float:
    source = _C.SourceFile(path, method)
    begin = time.perf_counter()
    for offset in range(0, PROBE_BYTES, BLOCK_BYTES):
        source.read(offset, BLOCK_BYTES, arena.address, BLOCK_BYTES + 8192)
    seconds = time.perf_counter() - begin
    source.close()
    return seconds
