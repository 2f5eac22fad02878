"""What to merge: the recipe in the dialect of mergekit, checked, and its parameters per tensor."""

from pymerge.recipe.load import load_recipe
from pymerge.recipe.recipe import Recipe
from pymerge.recipe.reference import ModelRef
from pymerge.recipe.resolve import (
    OutputSlice,
    SliceSource,
    expand,
    parameters_for,
    position,
    unmatched_filters,
)

__all__ = [
    "ModelRef",
    "OutputSlice",
    "Recipe",
    "SliceSource",
    "expand",
    "load_recipe",
    "parameters_for",
    "position",
    "unmatched_filters",
]
