"""How a recipe names a model, as pydantic models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from pymerge.names import split_adapter
from pymerge.recipe.reference import ModelRef, split_reference


class Document(BaseModel):
    """A mapping of the recipe that takes no unknown keys."""

    # Only the recipe's own schema is ever run; it holds those of its parts.
    model_config = ConfigDict(extra="forbid", defer_build=True)


class PathDocument(Document):
    """``path``, ``path@revision`` or ``{path, revision}``."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            path, revision = split_reference(raw)
            return {"path": path, "revision": revision}
        return raw

    @field_validator("path")
    @classmethod
    def _not_empty(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("expected a path or a hub name, found an empty text")
        return path

    @property
    def text(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


class ModelDocument(Document):
    """A model reference: the text, or ``{model, lora, override_architecture}``."""

    model: PathDocument
    lora: PathDocument | None = None
    override_architecture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            model, adapter = split_adapter(raw)
            return {"model": model} if adapter is None else {"model": model, "lora": adapter}
        return raw

    @property
    def reference(self) -> ModelRef:
        adapter = None if self.lora is None else self.lora.text
        return ModelRef(self.model.path, self.model.revision, self.override_architecture, adapter)
