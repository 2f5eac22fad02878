"""What to merge: the recipe in the dialect of mergekit, checked, and its parameters per tensor."""

from pymerge.recipe.documents import Document, in_order, split_documents
from pymerge.recipe.effects import without_effect
from pymerge.recipe.load import load_recipe
from pymerge.recipe.recipe import Recipe, RecipeModule
from pymerge.recipe.reference import ModelRef
from pymerge.recipe.resolve import (
    DEFAULT_ORIGIN,
    OutputSlice,
    SliceSource,
    all_settings,
    expand,
    parameters_for,
    position,
    unmatched_filters,
)

__all__ = [
    "DEFAULT_ORIGIN",
    "Document",
    "ModelRef",
    "OutputSlice",
    "Recipe",
    "RecipeModule",
    "SliceSource",
    "all_settings",
    "expand",
    "in_order",
    "load_recipe",
    "parameters_for",
    "position",
    "split_documents",
    "unmatched_filters",
    "without_effect",
]
