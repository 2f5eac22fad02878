"""JSON read without the leniencies of the standard library.

Python's reader keeps the last of two equal keys, takes NaN, lets half a surrogate pair through and
turns ``-0`` into 0. Each of these would let a checkpoint mean one thing here and another in the
program that loads it, so headers and indices are read by these rules instead.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

#: 19 digits hold every number below 2**63; a longer one is no size, offset or dimension.
MAX_DIGITS = 19


class OddNumber:
    """A number that is no plain non-negative integer of at most 19 digits; of no number type."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = 60


def shown(value: object) -> str:
    """A short text of any value, for an error message."""
    return _Shortener().repr(value)


def shown_names(names: list[str], limit: int = 5) -> str:
    """The first names of a list and how many more there are, for an error message."""
    text = ", ".join(shown(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can hold (no half surrogate pair)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that ``text`` (UTF-8) holds.

    Numbers other than plain non-negative integers come back as `OddNumber`. Raises ValueError with
    what is wrong: no UTF-8, no JSON, no object, a key given twice, NaN or Infinity, too deeply
    nested.
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_plain_integer,
            parse_float=OddNumber,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"text that is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} instead of an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} twice in one object")
        found[key] = value
    return found


def _plain_integer(text: str) -> int | OddNumber:
    return int(text) if text[0] != "-" and len(text) <= MAX_DIGITS else OddNumber(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is not JSON")
