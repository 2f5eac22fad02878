"""The mergekit dialect as pydantic models: which keys stand where, and of what type they are.

Parameter settings are left as they are; ``values`` checks them against the method. The models
refuse unknown keys, and ``validate`` turns what pydantic reports into findings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pymerge.formats import BY_TORCH_NAME, Format
from pymerge.names import listed, nearest, shown, split_adapter
from pymerge.recipe.findings import Findings, path_text
from pymerge.recipe.reference import ModelRef, split_reference
from pymerge.recipe.yaml_tree import Node, Path

DTYPES = {name: fmt for name, fmt in BY_TORCH_NAME.items() if fmt.writable}


class _Document(BaseModel):
    # Only the recipe's own schema is ever run; it holds those of its parts.
    model_config = ConfigDict(extra="forbid", defer_build=True)


class PathDocument(_Document):
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


class ModelDocument(_Document):
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


class EntryDocument(_Document):
    """One of ``models``: a whole model."""

    model: ModelDocument
    parameters: dict[str, Any] | None = None


class SourceDocument(_Document):
    """One of ``slices[*].sources``: layers start to end of a model, the end excluded."""

    model: ModelDocument
    layer_range: list[StrictInt] = Field(min_length=2, max_length=2)
    parameters: dict[str, Any] | None = None

    @field_validator("layer_range")
    @classmethod
    def _ordered(cls, layer_range: list[int]) -> list[int]:
        start, stop = layer_range
        if not 0 <= start <= stop:
            raise ValueError(
                f"expected [start, end) with 0 <= start <= end, found {layer_range}; layers count "
                "from 0 and the end is not included"
            )
        return layer_range


class SliceDocument(_Document):
    """One of ``slices``: the layers of the output that its sources are merged into."""

    sources: list[SourceDocument] = Field(min_length=1)
    base_model: ModelDocument | None = None
    parameters: dict[str, Any] | None = None
    residual_weight: Any = None


def _tokenizer_model(raw: Any) -> Any:
    """What names the tokenizer: a model, or None for the donor's."""
    if raw == "union":
        raise ValueError(
            "the union of tokenizers is not supported in this version; use base or the model whose "
            "tokenizer the output takes"
        )
    # The donor's tokenizer, as without the key, even where a folder is called base.
    return None if raw == "base" else raw


class TokenizerDocument(_Document):
    """``tokenizer``: the other spelling of ``tokenizer_source``."""

    source: ModelDocument | None
    tokens: Any = None
    pad_to_multiple_of: Any = None

    @field_validator("source", mode="before")
    @classmethod
    def _no_union(cls, raw: Any) -> Any:
        return _tokenizer_model(raw)

    @field_validator("tokens", "pad_to_multiple_of")
    @classmethod
    def _as_it_is(cls, raw: Any) -> None:
        if raw is not None:
            raise ValueError(
                "not supported in this version, which copies a tokenizer as it is; leave it out"
            )


class RecipeDocument(_Document):
    """The whole recipe."""

    merge_method: str
    models: list[EntryDocument] | None = None
    slices: list[SliceDocument] | None = None
    modules: Any = None
    base_model: ModelDocument | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelDocument | None = None
    tokenizer: TokenizerDocument | None = None
    chat_template: Any = None

    @field_validator("modules")
    @classmethod
    def _no_modules(cls, raw: Any) -> None:
        if raw:
            raise ValueError(
                "models of several modules are not supported in this version; use models or slices"
            )

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, name: str | None) -> str | None:
        if name is None:
            return None
        short = name.removeprefix("torch.")
        if short not in DTYPES:
            match = nearest(short, DTYPES)
            hint = f"; did you mean {match!r}?" if match else ";"
            raise ValueError(f"unknown dtype {name!r}{hint} expected one of {listed(DTYPES)}")
        return short

    @field_validator("tokenizer_source", mode="before")
    @classmethod
    def _no_union(cls, raw: Any) -> Any:
        return _tokenizer_model(raw)

    @field_validator("chat_template")
    @classmethod
    def _no_chat_template(cls, raw: Any) -> None:
        if raw is not None:
            meaning = "the commonest template of all models" if raw == "auto" else "a new template"
            raise ValueError(
                f"{meaning} is not supported in this version; leave chat_template out, and the "
                "template comes with the tokenizer of tokenizer_source"
            )

    @model_validator(mode="after")
    def _one_form(self) -> RecipeDocument:
        forms = [name for name in ("models", "slices") if getattr(self, name)]
        if len(forms) != 1:
            found = " and ".join(forms) if forms else "neither"
            raise ValueError(f"expected exactly one of models and slices, found {found}")
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> RecipeDocument:
        if self.tokenizer and "tokenizer_source" in self.model_fields_set:
            raise ValueError("expected at most one of tokenizer and tokenizer_source, found both")
        return self

    @property
    def tokenizer_model(self) -> ModelDocument | None:
        """Whose tokenizer the output takes, None for the donor's."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def format(self) -> Format | None:
        return None if self.dtype is None else DTYPES[self.dtype]

    @property
    def out_format(self) -> Format | None:
        return None if self.out_dtype is None else DTYPES[self.out_dtype]


#: Where a key of the dialect belongs, for a message about one that stands elsewhere.
_HOMES: dict[str, str] = {}
for _document, _home in (
    (RecipeDocument, "the top level"),
    (EntryDocument, "models[*]"),
    (SliceDocument, "slices[*]"),
    (SourceDocument, "slices[*].sources[*]"),
    (ModelDocument, "the mapping form of a model, model: {model, lora, override_architecture}"),
    (TokenizerDocument, "tokenizer"),
    (PathDocument, "the mapping form of a model's path, model: {model: {path, revision}}"),
):
    for _name in _document.model_fields:
        _HOMES.setdefault(_name, _home)


def home_of(key: str) -> str | None:
    """A sentence on where a key of the dialect belongs, or None for no such key."""
    home = _HOMES.get(key)
    return None if home is None else f"it belongs to {home}"


def validate(
    raw: dict[str, Any], root: Node, parameters: Collection[str], findings: Findings
) -> RecipeDocument | None:
    """The document, or None with errors in ``findings``; ``raw`` is the data of ``root``.

    ``parameters`` are the names of the method's parameters, which may have been written in the
    wrong place. Keys that resemble nothing are warnings and are dropped from ``raw``.
    """
    try:
        return RecipeDocument.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=True)
    num_errors = len(findings.errors)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    suggested: set[Path] = set()
    for problem in unknown:
        path: Path = problem["loc"]
        key = str(path[-1])
        allowed = _fields_at(path[:-1])
        match = nearest(key, allowed)
        if match is not None:
            suggested.add((*path[:-1], match))
        belongs = _parameter_home(key, parameters, exact=match is not None)
        if belongs is None and match is None:
            belongs = home_of(key)
        findings.unknown_key(path, allowed, belongs=belongs)
    for problem in problems:
        # A misspelt key explains why the right one is missing.
        if problem["type"] != "extra_forbidden" and problem["loc"] not in suggested:
            path = problem["loc"]
            missing = problem["type"] == "missing"
            sentence = _sentence(problem)
            findings.error(root.prefix_of(path[:-1] if missing else path), sentence)
    if len(findings.errors) > num_errors:
        return None
    for problem in unknown:
        _drop(raw, problem["loc"])
    # Checks of the whole document have not run yet where a part was wrong.
    return validate(raw, root, parameters, findings)


def _parameter_home(key: str, parameters: Collection[str], *, exact: bool) -> str | None:
    """A sentence where ``key`` is, or unless ``exact`` resembles, a parameter."""
    if key in parameters:
        return "it is a parameter of the method and belongs under 'parameters'"
    match = None if exact else nearest(key, parameters)
    if match is None:
        return None
    return f"did you mean the parameter {match!r}, which belongs under 'parameters'?"


def _fields_at(path: Path) -> list[str]:
    """The keys allowed in the mapping at ``path``."""
    document: type[BaseModel] = RecipeDocument
    for key in path:
        if isinstance(key, str):
            document = _document_of(document.model_fields[key].annotation)
    return list(document.model_fields)


def _document_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_document_of(part) for part in get_args(annotation) if part is not type(None))


def _drop(raw: Any, path: Path) -> None:
    for key in path[:-1]:
        raw = raw[key]
    # Through a YAML alias the same mapping may stand in two places.
    raw.pop(path[-1], None)


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def _sentence(problem: Any) -> str:
    """What is wrong, in our words, from one entry of ``ValidationError.errors()``."""
    kind, found = problem["type"], problem["input"]
    if kind == "missing":
        return f"the key {path_text(problem['loc'][-1:])!r} is required"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in ("too_short", "too_long"):
        return f"expected {_length(problem['ctx'])}, found {len(found)}"
    if kind in _EXPECTED:
        is_model = kind == "model_type" and problem["loc"][-1:] in {
            ("model",),
            ("base_model",),
            ("tokenizer_source",),
            ("source",),
        }
        expected = "the path or name of a model (in quotes if YAML reads it as a number)"
        return f"expected {expected if is_model else _EXPECTED[kind]}, found {shown(found)}"
    return str(problem["msg"])


def _length(context: Mapping[str, Any]) -> str:
    if "max_length" in context:
        return f"at most {context['max_length']} elements"
    count = context["min_length"]
    return f"at least {count} element{'' if count == 1 else 's'}"
