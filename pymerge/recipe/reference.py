"""Model references: a local path or a hub name, with a revision and an adapter where given."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRef:
    """One model of a recipe. Equality is textual: a folder written in two ways is two models.

    ``adapter`` is the reference of a LoRA adapter that is put on the model.
    """

    path: str
    revision: str | None = None
    override_architecture: str | None = None
    adapter: str | None = None

    @property
    def model(self) -> str:
        """The reference without the adapter."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


def split_reference(text: str) -> tuple[str, str | None]:
    """Path and revision of ``path`` or ``path@revision``.

    A local path that exists is taken whole, whatever characters it has. Raises ValueError with a
    sentence where the text is no reference.
    """
    if not text.strip():
        raise ValueError("expected a path or a hub name, found an empty text")
    if os.path.exists(text):
        return text, None
    path, at, revision = text.partition("@")
    if at and (not path or not revision or "@" in revision):
        raise ValueError(
            f"{text!r} is not an existing path and does not read as path@revision; write "
            "{path: ..., revision: ...} where the path itself has an @"
        )
    return path, revision or None
