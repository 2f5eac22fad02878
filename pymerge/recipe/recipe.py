"""A checked recipe: what to merge, before any checkpoint has been looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pymerge.formats import Format
from pymerge.methods.spec import MethodSpec
from pymerge.recipe.reference import ModelRef
from pymerge.recipe.tokenizer import TokenizerChoice
from pymerge.recipe.values import Setting

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class RecipeSource:
    """A model in a slice.

    ``layer_range`` None means all of its layers. ``place`` is where the document names it.
    ``appended`` marks a ``base_model`` that is not listed under ``models``.
    """

    model: ModelRef
    layer_range: tuple[int, int] | None
    settings: Settings = field(repr=False, compare=False)
    place: str
    appended: bool = False


@dataclass(frozen=True)
class RecipeSlice:
    """Models merged into consecutive layers of the output.

    ``base`` is the model that deltas are taken against, None in methods that take none; it is one
    of the sources.
    """

    sources: tuple[RecipeSource, ...]
    base: ModelRef | None
    settings: Settings = field(repr=False, compare=False)
    place: str


@dataclass(frozen=True)
class RecipeModule:
    """A part of a model of several parts, or with ``name`` None the whole of it.

    ``whole_models`` tells the ``models`` form (one slice over all layers) from the ``slices`` form.
    """

    name: str | None
    slices: tuple[RecipeSlice, ...]
    whole_models: bool
    settings: Settings = field(repr=False, compare=False)
    place: str


@dataclass(frozen=True, eq=False)
class Recipe:
    """What ``load_recipe`` returns.

    ``modules`` has one element without a name unless the document names modules. ``settings`` are
    those of the top level. ``dtype`` and ``out_dtype`` are None where not
    given. ``tokenizer`` is None where the donor's is taken as it is and the vocabularies are not
    looked at. ``chat_template`` is a Jinja text, ``auto``, or None where the tokenizer's own stays.
    ``text`` is the YAML as written. ``warnings`` are sentences for the user.
    """

    spec: MethodSpec
    modules: tuple[RecipeModule, ...]
    base_model: ModelRef | None
    settings: Settings = field(repr=False)
    dtype: Format | None
    out_dtype: Format | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None = field(repr=False)
    text: str = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def method(self) -> str:
        return self.spec.name

    @cached_property
    def slices(self) -> tuple[RecipeSlice, ...]:
        """The slices of all modules."""
        return tuple(each for module in self.modules for each in module.slices)

    @property
    def whole_models(self) -> bool:
        """Whether no layers are chosen anywhere."""
        return all(module.whole_models for module in self.modules)

    @property
    def donor(self) -> ModelRef:
        """The model whose names, configuration and other files the output takes.

        ``base_model`` where given, else the first model of the document.
        """
        return self.base_model or self.slices[0].sources[0].model

    @property
    def tokenizer_donor(self) -> ModelRef:
        """The model whose tokenizer files the output takes."""
        chosen = None if self.tokenizer is None else self.tokenizer.source
        return chosen if isinstance(chosen, ModelRef) else self.donor

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model to open, once, in the order of the document.

        A ``base_model`` that the document lists under no ``models`` or ``slices`` comes first.
        """
        sources = [source for each in self.slices for source in each.sources]
        models = [source.model for source in sources if not source.appended]
        if self.base_model is not None and self.base_model not in models:
            models.insert(0, self.base_model)
        return tuple(dict.fromkeys(models))
