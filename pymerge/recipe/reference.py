"""Model references: a local path or a hub name, with a revision where one is given."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRef:
    """One model of a recipe. Equality is textual: a folder written in two ways is two models."""

    path: str
    revision: str | None = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def split_reference(text: str) -> tuple[str, str | None]:
    """Path and revision of ``path`` or ``path@revision``.

    A local path that exists is taken whole, whatever characters it has. Raises ValueError with a
    sentence where the text is no reference or names an adapter.
    """
    if not text.strip():
        raise ValueError("expected a path or a hub name, found an empty text")
    if os.path.exists(text):
        return text, None
    if "+" in text:
        raise ValueError(
            f"{text!r} is not an existing path and so reads as base+adapter; adapters are not "
            "supported in this version; merge the adapter into its base first"
        )
    path, at, revision = text.partition("@")
    if at and (not path or not revision or "@" in revision):
        raise ValueError(
            f"{text!r} is not an existing path and does not read as path@revision; write "
            "{path: ..., revision: ...} where the path itself has an @"
        )
    return path, revision or None
