"""Type stubs of the extension: raw memory by address and byte count, files by path.

Calls that can block release the GIL. What the system refuses raises OSError with its errno, a text
that names the request with offset and lengths, and the path; arguments that no file could satisfy
raise ValueError. Several threads may use one object; ``close`` waits for calls under way.
"""

from os import PathLike
from pathlib import Path
from typing import Literal

_ReadMethod = Literal["dontcache", "direct", "buffered", "plain"]
_StrPath = str | PathLike[str]

# Memory

class Arena:
    """Anonymous memory, zero and untouched until its first use, freed with the object.

    Also a buffer of unsigned bytes, so that ``memoryview(arena)`` and numpy keep it alive.
    """

    def __init__(self, num_bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def release_pages(self, offset: int, num_bytes: int) -> None:
        """Give the whole pages inside the range back; they read as zeros afterwards."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

def copy(destination: int, source: int, num_bytes: int) -> None:
    """Copy bytes between addresses; the ranges may overlap."""

# Files

class SourceFile:
    """One file open for reading."""

    def __init__(self, path: _StrPath, method: str) -> None: ...
    @property
    def method(self) -> _ReadMethod:
        """The method in use: "plain" once the kernel has refused the one asked for."""
    @property
    def path(self) -> Path: ...
    def read(self, offset: int, length: int, block_address: int, block_bytes: int) -> int:
        """Read exactly ``length`` bytes into the block and return the address where they begin.

        That is ``block_address``, except with "direct", which over-reads to the alignment of the
        device and needs ``length + 8192`` bytes in a block aligned to 4096. A file that ends
        earlier is an OSError with errno.EIO.
        """
    def close(self) -> None: ...

class ShardFile:
    """One output file of known length, written in place.

    A new file gets mode 0666 less the umask and its blocks at once; where the disk is full it is
    removed again. With ``resume`` the file must exist with exactly ``num_bytes``, and nothing of it
    changes. ``drop_cache`` leaves nothing of it in the page cache.
    """

    def __init__(
        self, path: _StrPath, num_bytes: int, drop_cache: bool = False, resume: bool = False
    ) -> None: ...
    @property
    def preallocated(self) -> bool:
        """Whether the filesystem reserved the blocks."""
    @property
    def num_bytes(self) -> int: ...
    @property
    def path(self) -> Path: ...
    def write(self, offset: int, address: int, length: int) -> None: ...
    def sync(self) -> None:
        """Return when everything written is on the device. Once failed, never call it again."""
    def close(self) -> None: ...

def probe_read_method(path: _StrPath) -> tuple[_ReadMethod, str]:
    """The first of dontcache, direct, buffered, plain that suits the file, and the reason."""

def direct_alignment(path: _StrPath) -> tuple[int, int] | None:
    """Bytes that O_DIRECT aligns (memory, offset) to; zeros: impossible, None: not known."""

def cached_fraction(path: _StrPath) -> float:
    """The share of the file's pages in the page cache; EPERM where this process may not know."""

def filesystem(path: _StrPath) -> str:
    """The name of the filesystem, or its magic number in hexadecimal."""

def free_bytes(path: _StrPath) -> int:
    """Bytes that an unprivileged process may still allocate on the filesystem of the path."""

def fsync_directory(path: _StrPath) -> None:
    """Make creations, renames and removals in the folder durable."""

# Checksums: CRC-32C (Castagnoli)

def crc32c(address: int, num_bytes: int, crc: int = 0) -> int:
    """The checksum of bytes that follow others whose checksum is ``crc``."""

def crc32c_tables(address: int, num_bytes: int, crc: int = 0) -> int:
    """The same without the processor's instruction."""

def crc32c_combine(crc_a: int, crc_b: int, num_bytes_b: int) -> int:
    """The checksum of A followed by B, from both checksums and the length of B."""

def crc32c_implementation() -> Literal["sse4.2", "armv8", "tables"]: ...
