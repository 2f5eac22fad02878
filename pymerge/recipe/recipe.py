"""A checked recipe: what to merge, before any checkpoint has been looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pymerge.formats import Format
from pymerge.methods.spec import MethodSpec
from pymerge.recipe.reference import ModelRef
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


@dataclass(frozen=True, eq=False)
class Recipe:
    """What ``load_recipe`` returns.

    ``whole_models`` tells the ``models`` form (one slice over all layers) from the ``slices``
    form. ``settings`` are those of the top level. ``dtype`` and ``out_dtype`` are None where not
    given. ``tokenizer_source`` is None where the donor's tokenizer is taken. ``text`` is the YAML
    as written. ``warnings`` are sentences for the user.
    """

    spec: MethodSpec
    slices: tuple[RecipeSlice, ...]
    whole_models: bool
    base_model: ModelRef | None
    settings: Settings = field(repr=False)
    dtype: Format | None
    out_dtype: Format | None
    tokenizer_source: ModelRef | None
    text: str = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def method(self) -> str:
        return self.spec.name

    @property
    def donor(self) -> ModelRef:
        """The model whose names, configuration and other files the output takes.

        ``base_model`` where given, else the first model of the document.
        """
        return self.base_model or self.slices[0].sources[0].model

    @property
    def tokenizer_donor(self) -> ModelRef:
        return self.tokenizer_source or self.donor

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
