"""Reading a recipe: text to document to checked settings."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pymerge.errors import RecipeError
from pymerge.methods.spec import MethodSpec
from pymerge.names import listed, nearest, shown
from pymerge.recipe.findings import Findings, path_text
from pymerge.recipe.model_document import ModelDocument
from pymerge.recipe.names import MERGEKIT_METHODS, MERGEKIT_PARAMETERS, WITHOUT_EFFECT
from pymerge.recipe.recipe import Recipe, RecipeModule, RecipeSlice, RecipeSource, Settings
from pymerge.recipe.reference import ModelRef
from pymerge.recipe.schema import (
    EntryDocument,
    ModuleDocument,
    RecipeDocument,
    SliceDocument,
    home_of,
    validate,
)
from pymerge.recipe.tokenizer import TokenizerChoice, TokenRule
from pymerge.recipe.values import Setting, compile_setting
from pymerge.recipe.yaml_tree import MAX_DEPTH, MAX_INT, Node, parse_yaml
from pymerge.recipe.yaml_tree import Path as DocumentPath

#: A parameter of another method that resembles one of this method's as much is taken for a
#: misspelling: ``lamda`` for ``lambda``.
SAME_WORD = 0.9


def load_recipe(
    source: str | Path | Mapping[str, Any],
    *,
    specs: Mapping[str, MethodSpec],
    strict: bool = False,
) -> Recipe:
    """A checked recipe from a YAML file, YAML text or a mapping.

    A text of one line that is an existing file, or has no colon followed by a space, is a path.
    ``specs`` are the methods by name; only the recipe's is read, unless a parameter is unknown.
    With ``strict`` a warning is an error. Raises RecipeError that lists everything found wrong,
    with paths in the document and, for text, lines.
    """
    text, name = _read(source)
    try:
        root = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}" if name else str(error)) from error
    lines = None if isinstance(source, Mapping) else root
    findings = Findings(lines, name=name, strict=strict)
    recipe = _build(root, text, specs, findings)
    if findings.errors:
        raise findings.as_error()
    return recipe


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, str | None]:
    """The text and, for a file, its name."""
    if isinstance(source, Mapping):
        plain = _plain(source, ())
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), None
    if isinstance(source, str) and not _is_file_name(source):
        return source, None
    try:
        data = Path(source).read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe file at {str(source)!r}") from error
    except OSError as error:
        raise RecipeError(f"the recipe {str(source)!r} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig"), str(source)
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{source}: not a text file in UTF-8 (byte {error.start} is {data[error.start]:#04x})"
        ) from error


def _is_file_name(text: str) -> bool:
    if not text.strip() or "\n" in text or "\0" in text:
        return False
    if os.path.isfile(text):
        return True
    return not (": " in text or text.endswith(":") or text.lstrip()[0] in "{[#-")


def _plain(value: Any, path: DocumentPath) -> Any:
    """A copy of a document from Python that YAML can write; RecipeError for anything else."""
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{path_text(path)[:80]}...: nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{path_text(path)}: the key {shown(key)} is not text")
        return {key: _plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool)):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, numbers.Integral):
        if abs(int(value)) > MAX_INT:
            raise RecipeError(f"{path_text(path)}: the number is beyond {MAX_INT}")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise RecipeError(
        f"{path_text(path)}: expected text, a number, a boolean, a list or a mapping, found an "
        f"object of type {type(value).__name__}"
    )


def _build(root: Node, text: str, specs: Mapping[str, MethodSpec], findings: Findings) -> Recipe:
    """The recipe, which holds only if ``findings`` has no error.

    Raises RecipeError where no recipe can be made at all.
    """
    raw = root.data()
    if not isinstance(raw, dict):
        findings.error((), f"expected a mapping with merge_method and models, found {shown(raw)}")
        raise findings.as_error()
    name = raw.get("merge_method")
    spec = specs.get(name) if isinstance(name, str) else None
    document = validate(raw, root, spec.parameters if spec else (), findings)
    if isinstance(name, str) and spec is None:
        findings.error(
            ("merge_method",), f"{_unknown(name, specs)} the methods are {listed(specs)}"
        )
    if document is None or spec is None:
        raise findings.as_error()
    return _Builder(document, spec, specs, findings).build(text)


def _unknown(name: str, specs: Iterable[str]) -> str:
    """What is wrong with a method's name."""
    if name in MERGEKIT_METHODS:
        return f"{name!r} is a method of mergekit that this version does not have;"
    match = nearest(name, specs)
    return f"unknown method {name!r};" + (f" did you mean {match!r}?" if match else "")


class _Builder:
    """Turns a valid document into a recipe for one method, with findings on the way."""

    def __init__(
        self,
        document: RecipeDocument,
        spec: MethodSpec,
        specs: Mapping[str, MethodSpec],
        findings: Findings,
    ) -> None:
        self._document = document
        self._spec = spec
        self._findings = findings
        self._specs = specs

    def build(self, text: str) -> Recipe:
        document = self._document
        if document.modules:
            modules = tuple(self._module(name, each) for name, each in document.modules.items())
        else:
            modules = (self._module(None, document),)
        return Recipe(
            spec=self._spec,
            modules=modules,
            base_model=_reference(document.base_model),
            settings=self._settings(document.parameters, ("parameters",)),
            dtype=document.format,
            out_dtype=document.out_format,
            tokenizer=self._tokenizer(modules),
            chat_template=document.chat_template,
            text=text,
            warnings=tuple(self._findings.warnings),
        )

    def _tokenizer(self, modules: Sequence[RecipeModule]) -> TokenizerChoice | None:
        document = self._document.tokenizer
        if document is None:
            source = self._document.tokenizer_source
            if source is None:
                return None
            place = self._findings.place(("tokenizer_source",))
            return TokenizerChoice(_chosen(source), place=place)
        merged = {s.model for module in modules for part in module.slices for s in part.sources}
        if self._document.base_model is not None:
            merged.add(self._document.base_model.reference)
        rules = []
        for token, entry in (document.tokens or {}).items():
            path: DocumentPath = ("tokenizer", "tokens", token)
            model = None if entry.source is None else entry.source.model
            if model is not None and model not in merged:
                self._findings.error(
                    (*path, "source"),
                    f"the model {model} is none of those that are merged "
                    f"({listed(map(str, merged))}); rows of the embeddings come from these",
                )
            rules.append(TokenRule(token, entry.source, entry.force, self._findings.place(path)))
        return TokenizerChoice(
            _chosen(document.source),
            tuple(rules),
            document.pad_to_multiple_of,
            self._findings.place(("tokenizer",)),
        )

    def _module(self, name: str | None, document: RecipeDocument | ModuleDocument) -> RecipeModule:
        path: DocumentPath = () if name is None else ("modules", name)
        slices = (
            (self._whole_models(document.models, (*path, "models")),)
            if document.models
            else tuple(
                self._slice(each, (*path, "slices", i))
                for i, each in enumerate(document.slices or ())
            )
        )
        settings = (
            {}  # the top level's are the recipe's own
            if name is None
            else self._settings(document.parameters, (*path, "parameters"))
        )
        return RecipeModule(
            name, slices, bool(document.models), settings, self._findings.place(path)
        )

    def _whole_models(
        self, entries: Sequence[EntryDocument], entries_path: DocumentPath
    ) -> RecipeSlice:
        base = _reference(self._document.base_model)
        delta_base = None if self._spec.base == "input" else base
        sources = []
        for index, entry in enumerate(entries):
            path = (*entries_path, index)
            model = entry.model.reference
            sources.append(self._source(model, None, entry.parameters, path, delta_base))
        if base is not None and all(source.model != base for source in sources):
            place = self._findings.place(("base_model",))
            sources.append(RecipeSource(base, None, {}, place, appended=True))
        self._check_slice(sources, delta_base, entries_path)
        return RecipeSlice(tuple(sources), delta_base, {}, path_text(entries_path))

    def _slice(self, document: SliceDocument, path: DocumentPath) -> RecipeSlice:
        if "residual_weight" in document.model_fields_set:
            self._findings.warn(
                (*path, "residual_weight"), "residual_weight has no effect, as in mergekit"
            )
        base = _reference(document.base_model or self._document.base_model)
        delta_base = None if self._spec.base == "input" else base
        sources = []
        for position, entry in enumerate(document.sources):
            source_path = (*path, "sources", position)
            start, stop = entry.layer_range
            sources.append(
                self._source(
                    entry.model.reference, (start, stop), entry.parameters, source_path, delta_base
                )
            )
        lengths = [stop - start for start, stop in (e.layer_range for e in document.sources)]
        if len(set(lengths)) > 1:
            counts = ", ".join(
                f"{source.model} {length}" for source, length in zip(sources, lengths, strict=True)
            )
            self._findings.error(
                path, f"the sources of a slice must span equally many layers, found {counts}"
            )
        if delta_base is not None and all(source.model != delta_base for source in sources):
            self._findings.error(
                (*path, "sources"),
                f"the base model {delta_base} is not among the sources; with slices, "
                f"{self._spec.name} takes the base's layers from a source of its own: add "
                f"{{model: {delta_base}, layer_range: [start, end]}}",
            )
        self._check_slice(sources, delta_base, (*path, "sources"))
        settings = self._settings(document.parameters, (*path, "parameters"))
        return RecipeSlice(tuple(sources), delta_base, settings, self._findings.place(path))

    def _source(
        self,
        model: ModelRef,
        layer_range: tuple[int, int] | None,
        parameters: Mapping[str, Any] | None,
        path: DocumentPath,
        base: ModelRef | None,
    ) -> RecipeSource:
        settings = self._settings(
            parameters, (*path, "parameters"), of_model=True, of_base=model == base
        )
        return RecipeSource(model, layer_range, settings, self._findings.place(path))

    def _check_slice(
        self, sources: Sequence[RecipeSource], base: ModelRef | None, path: DocumentPath
    ) -> None:
        spec, findings = self._spec, self._findings
        seen: dict[ModelRef, str] = {}
        for index, source in enumerate(sources):
            if source.model in seen:
                findings.error(
                    (*path, index),
                    f"the model {source.model} already stands at {seen[source.model]}; "
                    "a model may appear once in a slice",
                )
            seen.setdefault(source.model, source.place)
        if spec.base == "required" and base is None:
            findings.error(
                path[:-1], f"{spec.name} needs a base_model: the model that the others came from"
            )
        count = sum(source.model != base for source in sources)
        if count < spec.min_models or (spec.max_models is not None and count > spec.max_models):
            besides = " besides the base" if base is not None else ""
            added = any(source.appended for source in sources) and base is None
            hint = (
                "; base_model is an ordinary input of this method and is not listed under models, "
                "so it was added to them"
                if added
                else ""
            )
            findings.error(path, f"{spec.name} takes {_count(spec)}{besides}, found {count}{hint}")

    def _settings(
        self,
        parameters: Mapping[str, Any] | None,
        path: DocumentPath,
        *,
        of_model: bool = False,
        of_base: bool = False,
    ) -> Settings:
        settings: dict[str, Setting] = {}
        for name, raw in (parameters or {}).items():
            here = (*path, name)
            spec = self._spec.parameters.get(name)
            if spec is None:
                self._unknown_parameter(here)
            elif spec.ignored:
                continue
            elif of_model and spec.scope == "shared":
                self._findings.warn(
                    here,
                    f"{name} has no effect under one model, it holds for all of them; write it "
                    "under the top-level parameters or a slice's",
                )
            elif of_base:
                self._findings.warn(
                    here, f"{name} has no effect on the base model of {self._spec.name}"
                )
            else:
                setting = compile_setting(raw, spec, here, self._findings)
                if setting is not None:
                    settings[name] = setting
        return settings

    def _unknown_parameter(self, path: DocumentPath) -> None:
        name = str(path[-1])
        if name in WITHOUT_EFFECT:
            return
        known = {*MERGEKIT_PARAMETERS, *(p for s in self._specs.values() for p in s.parameters)}
        misspelt = difflib.get_close_matches(name, self._spec.parameters, n=1, cutoff=SAME_WORD)
        if name in known and not misspelt:
            self._findings.warn(
                path,
                f"{name} has no effect in {self._spec.name}, whose parameters are "
                f"{listed(self._spec.parameters) or 'none'}",
            )
            return
        match = nearest(name, self._spec.parameters)
        self._findings.unknown_key(
            path,
            self._spec.parameters,
            noun="parameter",
            near=known,
            belongs=None if match else home_of(name),
        )


def _reference(document: ModelDocument | None) -> ModelRef | None:
    return None if document is None else document.reference


def _chosen(source: str | ModelDocument) -> Any:
    return source.reference if isinstance(source, ModelDocument) else source


def _count(spec: MethodSpec) -> str:
    if spec.max_models is None:
        return f"{spec.min_models} or more models"
    if spec.min_models == spec.max_models:
        return f"exactly {spec.min_models} model{'' if spec.min_models == 1 else 's'}"
    return f"{spec.min_models} to {spec.max_models} models"
