"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from pymerge.errors import PymergeError
from pymerge.names import shown

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
#: No file or memory is larger, and every count below fits into 64 bits.
MAX_BYTES = 1 << 60
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int, what: str) -> int:
    """Bytes of ``"2GiB"``, ``"500MB"`` or a plain number.

    :raises PymergeError: it does not read as a size, or is larger than any storage; ``what`` names
        the option.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return _bounded(text, text, what)
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise PymergeError(
            f"{what}: {shown(text)} is not a size; write a number with one of B, KB, MB, GB, TB "
            "(powers of 1000) or "
            "KiB, MiB, GiB, TiB (powers of 1024), for example 2GiB"
        )
    return _bounded(float(match[1]) * _UNITS[match[2].lower()], text, what)


def _bounded(num_bytes: float, text: str | int, what: str) -> int:
    if num_bytes > MAX_BYTES:
        raise PymergeError(
            f"{what}: {shown(text)} is too large; a size is at most {MAX_BYTES >> 40:,} TiB"
        )
    return int(num_bytes)


def format_size(num_bytes: float) -> str:
    """``1.5 GiB``; three significant digits at most."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"
