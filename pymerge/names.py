"""Names: the nearest one to a misspelt one, lists and short values for messages, base+adapter.

A leaf module: it imports nothing of pymerge.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable

_MIN_RATIO = 0.7
_MIN_AFFIX = 4

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most resembles, or None where it resembles none.

    Upper case, dashes and underscores do not count; a beginning or an end of four characters or
    more is a resemblance too (``base`` for ``base_model``).
    """
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(_fold(candidate), candidate)
    wanted = _fold(name)
    matches = difflib.get_close_matches(wanted, folded, n=1, cutoff=_MIN_RATIO)
    if matches:
        return folded[matches[0]]
    if len(wanted) >= _MIN_AFFIX:
        for text, candidate in folded.items():
            if text.startswith(wanted) or text.endswith(wanted):
                return candidate
    return None


def _fold(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "").strip()


def listed(names: Iterable[str]) -> str:
    """The names in order of the alphabet, for a sentence."""
    return ", ".join(sorted(names))


def shown(value: object) -> str:
    """A value as a message shows it: short however large it is."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "a list of lists or mappings"
    return _SHORT.repr(value)


def split_adapter(text: str) -> tuple[str, str | None]:
    """Model and adapter of ``base+adapter``; a text without ``+`` is a model.

    An existing path is taken whole, whatever characters it has. Where several ``+`` could part the
    two, it is the one with existing paths on both sides. Raises ValueError with a sentence.
    """
    if "+" not in text or os.path.exists(text):
        return text, None
    places = [index for index, letter in enumerate(text) if letter == "+"]
    parts = [(text[:index], text[index + 1 :]) for index in places]
    if len(parts) > 1:
        parts = [(a, b) for a, b in parts if os.path.exists(a) and os.path.exists(b)]
    if len(parts) != 1:
        raise ValueError(
            f"{text!r} is not an existing path and has several '+', so that it does not read as "
            "base+adapter; write {model: {path: ...}, lora: {path: ...}}"
        )
    base, adapter = parts[0]
    if not base.strip() or not adapter.strip():
        raise ValueError(
            f"{text!r} is not an existing path and does not read as base+adapter: one side of the "
            "'+' is empty"
        )
    return base, adapter
