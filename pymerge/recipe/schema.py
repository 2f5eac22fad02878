"""The mergekit dialect as pydantic models: which keys stand where, and of what type they are.

Parameter settings are left as they are; ``values`` checks them against the method. The models
refuse unknown keys, and ``validate`` turns what pydantic reports into findings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from pydantic import (
    BaseModel,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pymerge.formats import BY_TORCH_NAME, Format
from pymerge.names import listed, nearest, shown
from pymerge.recipe.findings import Findings, path_text
from pymerge.recipe.model_document import Document, ModelDocument, PathDocument
from pymerge.recipe.tokenizer import (
    TokenDocument,
    TokenizerDocument,
    chat_template_of,
    tokenizer_source,
)
from pymerge.recipe.yaml_tree import Node, Path

DTYPES = {name: fmt for name, fmt in BY_TORCH_NAME.items() if fmt.writable}
_SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


class EntryDocument(Document):
    """One of ``models``: a whole model."""

    model: ModelDocument
    parameters: dict[str, Any] | None = None


class SourceDocument(Document):
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


class SliceDocument(Document):
    """One of ``slices``: the layers of the output that its sources are merged into."""

    sources: list[SourceDocument] = Field(min_length=1)
    base_model: ModelDocument | None = None
    parameters: dict[str, Any] | None = None
    residual_weight: Any = None


class ModuleDocument(Document):
    """One of ``modules``: a part of the model, as whole models or as slices."""

    models: list[EntryDocument] | None = None
    slices: list[SliceDocument] | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ModuleDocument:
        _check_forms(self, ("models", "slices"))
        return self


def _check_forms(document: BaseModel, forms: tuple[str, ...]) -> None:
    """Raises ValueError unless exactly one of the keys is given."""
    given = [name for name in forms if getattr(document, name)]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise ValueError(f"expected exactly one of {listed(forms)}, found {found}")


class RecipeDocument(Document):
    """The whole recipe."""

    merge_method: str
    #: Under which other documents of the same file use the output; ``documents`` reads it.
    name: Any = None
    models: list[EntryDocument] | None = None
    slices: list[SliceDocument] | None = None
    modules: dict[str, ModuleDocument] | None = None
    base_model: ModelDocument | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: TokenizerDocument | None = None
    chat_template: Any = None

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, name: str | None) -> str | None:
        if name is None:
            return None
        short = name.removeprefix("torch.")
        if short not in DTYPES:
            match = _SHORT_DTYPES.get(short.lower()) or nearest(short, DTYPES)
            hint = f"; did you mean {match!r}?" if match else ";"
            raise ValueError(f"unknown dtype {name!r}{hint} expected one of {listed(DTYPES)}")
        return short

    @field_validator("tokenizer_source")
    @classmethod
    def _known_source(cls, raw: Any) -> Any:
        return tokenizer_source(raw)

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, raw: Any) -> str | None:
        return chat_template_of(raw)

    @model_validator(mode="after")
    def _one_form(self) -> RecipeDocument:
        _check_forms(self, ("models", "slices", "modules"))
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> RecipeDocument:
        if self.tokenizer and "tokenizer_source" in self.model_fields_set:
            raise ValueError("expected at most one of tokenizer and tokenizer_source, found both")
        return self

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
    (ModuleDocument, "modules.NAME"),
    (SliceDocument, "slices[*]"),
    (SourceDocument, "slices[*].sources[*]"),
    (ModelDocument, "the mapping form of a model, model: {model, lora, override_architecture}"),
    (TokenizerDocument, "tokenizer"),
    (TokenDocument, "tokenizer.tokens.TOKEN"),
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
    keys = iter(path)
    for key in keys:
        if isinstance(key, str):
            document = _document_of(document.model_fields[key].annotation)
        if (document, key) in ((ModuleDocument, "modules"), (TokenDocument, "tokens")):
            next(keys, None)  # the module's name, the token
    return list(document.model_fields)


def _document_of(annotation: Any) -> type[BaseModel]:
    """The document that a field holds, a list or a mapping of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = [part for part in get_args(annotation) if part not in (type(None), str)]
    return _document_of(parts[0])


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
        }
        expected = "the path or name of a model (in quotes if YAML reads it as a number)"
        return f"expected {expected if is_model else _EXPECTED[kind]}, found {shown(found)}"
    return str(problem["msg"])


def _length(context: Mapping[str, Any]) -> str:
    if "max_length" in context:
        return f"at most {context['max_length']} elements"
    count = context["min_length"]
    return f"at least {count} element{'' if count == 1 else 's'}"
