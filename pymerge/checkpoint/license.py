"""The license of a model, as the front matter of its card names it."""

from __future__ import annotations

import re
from typing import Any

from pymerge.checkpoint.adapter import update_of
from pymerge.checkpoint.source import Checkpoint

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 20
#: A license by the hub's short names; these two name none.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NO_NAMES = frozenset({"other", "unknown"})
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


def license_of(checkpoint: Checkpoint) -> str | None:
    """The hub's short name of the license; None where no card names one, and for a model with an
    adapter, which may have another."""
    if checkpoint.folder is None or any(map(update_of, checkpoint.tensors.values())):
        return None
    try:
        with (checkpoint.folder / CARD_NAME).open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    found = _front_matter(text).get("license")
    if not isinstance(found, str) or found in _NO_NAMES or not _LICENSE.fullmatch(found):
        return None
    return found


def _front_matter(text: str) -> dict[str, Any]:
    """Empty where there is none that can be read: a card is for people, and never an error."""
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    try:
        fields = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
