"""What a recipe says of the output's tokenizer: its documents, and the choice they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictBool, StrictInt, ValidationError, field_validator, model_validator

from pymerge.names import listed, nearest, shown
from pymerge.recipe.model_document import Document, ModelDocument
from pymerge.recipe.reference import ModelRef

#: Keys of the mapping form of ``source`` by its ``kind``.
_KINDS = {"zero": frozenset[str](), "model_token": frozenset({"model", "token", "token_id"})}
#: Shorter texts are no template; a longer one, or one with a brace, is no name of one.
SHORTEST_TEMPLATE, LONGEST_NAME = 20, 256


@dataclass(frozen=True)
class TokenSource:
    """Where the row of a token comes from: of ``model`` that of the token itself, of another
    ``token`` or at ``token_id``; zeros without a model."""

    model: ModelRef | None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """An entry of ``tokenizer.tokens``. ``source`` None leaves the choice to the general rules;
    with ``force`` models that have the token take the row as well."""

    token: str
    source: TokenSource | None
    force: bool
    place: str


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer the output has. ``place`` is where the document says so."""

    source: ModelRef | Literal["base", "union"]
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None
    place: str = "tokenizer_source"


def tokenizer_source(raw: Any) -> Any:
    """``base`` and ``union`` as they are, even where a folder is called so, else a model.

    Raises ValueError with a sentence.
    """
    if raw is None or raw in ("base", "union") or isinstance(raw, ModelDocument):
        return raw
    return _model(raw, "expected base, union, or the path or name of a model")


def _model(raw: Any, expected: str) -> ModelDocument:
    if not isinstance(raw, (str, dict)):
        raise ValueError(f"{expected} (in quotes if YAML reads it as a number), found {shown(raw)}")
    try:
        return ModelDocument.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        context: Any = first.get("ctx", {})
        where = ".".join(map(str, first["loc"]))
        reason = str(context.get("error", first["msg"]))
        if first["type"] == "extra_forbidden":
            reason = f"the key {where!r} has no meaning here"
        elif where:
            reason = f"{where}: {reason}"
        raise ValueError(reason) from None


class TokenDocument(Document):
    """One of ``tokenizer.tokens``: the row of a token."""

    source: Any = None
    force: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, raw: Any) -> Any:
        return {} if raw is None else raw

    @field_validator("source")
    @classmethod
    def _known(cls, raw: Any) -> TokenSource | None:
        if raw is None or isinstance(raw, TokenSource):
            return raw
        if isinstance(raw, dict) and "kind" in raw:
            return _of_kind(raw)
        expected = "expected a model, {kind: model_token, ...} or {kind: zero}"
        return TokenSource(_model(raw, expected).reference)

    @model_validator(mode="after")
    def _something_to_force(self) -> TokenDocument:
        if self.force and self.source is None:
            raise ValueError("force needs a source: the row that all models take")
        return self


def _of_kind(raw: dict[str, Any]) -> TokenSource:
    """A source in its mapping form. Raises ValueError."""
    kind = raw["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        match = nearest(kind, _KINDS) if isinstance(kind, str) else None
        hint = f"; did you mean {match!r}?" if match else ""
        raise ValueError(f"unknown kind {shown(kind)}{hint} expected one of {listed(_KINDS)}")
    extra = sorted(raw.keys() - _KINDS[kind] - {"kind"})
    if extra:
        raise ValueError(
            f"the key {extra[0]!r} has no meaning with kind {kind}; allowed: "
            f"{listed({'kind', *_KINDS[kind]})}"
        )
    if kind == "zero":
        return TokenSource(None)
    token, token_id = raw.get("token"), raw.get("token_id")
    if raw.get("model") is None:
        raise ValueError("kind model_token needs a model")
    if (token is None) == (token_id is None):
        found = "neither" if token is None else "both"
        raise ValueError(f"expected one of token and token_id, found {found}")
    if token is not None and not isinstance(token, str):
        raise ValueError(
            f"token: expected text (in quotes if YAML reads it otherwise), found {shown(token)}"
        )
    if token_id is not None and (type(token_id) is not int or token_id < 0):
        raise ValueError(f"token_id: expected a whole number from 0 on, found {shown(token_id)}")
    model = _model(raw["model"], "model: expected the path or name of a model")
    return TokenSource(model.reference, token, token_id)


class TokenizerDocument(Document):
    """``tokenizer``: the longer spelling of ``tokenizer_source``."""

    source: Any = "union"
    tokens: dict[str, TokenDocument] | None = None
    pad_to_multiple_of: StrictInt | None = None

    @field_validator("source")
    @classmethod
    def _known_source(cls, raw: Any) -> Any:
        if raw is None:
            raise ValueError("expected base, union or a model, found nothing")
        return tokenizer_source(raw)

    @field_validator("pad_to_multiple_of")
    @classmethod
    def _positive(cls, raw: int | None) -> int | None:
        if raw is not None and raw < 0:
            raise ValueError(f"expected a whole number from 1 on, found {raw}")
        return raw or None  # 0 pads nothing, as in mergekit


def chat_template_of(raw: Any) -> str | None:
    """``auto``, or the text of a template: given, or one of ours by its name.

    Raises ValueError with a sentence.
    """
    if raw is None or raw == "":
        return None
    if not isinstance(raw, str):
        raise ValueError(
            f"expected auto, the name of a template or a Jinja text, found {shown(raw)}"
        )
    if raw == "auto":
        return raw
    from pymerge.recipe.chat_templates import TEMPLATES

    if raw in TEMPLATES:
        return TEMPLATES[raw]
    if len(raw) >= SHORTEST_TEMPLATE and "{" in raw:
        return raw
    match = nearest(raw, ("auto", *TEMPLATES)) if len(raw) < LONGEST_NAME else None
    hint = f"; did you mean {match!r}?" if match else ";"
    raise ValueError(
        f"{shown(raw)} is no chat template{hint} expected auto, one of {listed(TEMPLATES)}, or a "
        f"Jinja text of at least {SHORTEST_TEMPLATE} characters with a '{{' in it"
    )
