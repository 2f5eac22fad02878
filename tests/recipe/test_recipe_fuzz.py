"""Whatever is given, loading ends in a recipe or in a RecipeError, soon."""

import contextlib

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymerge.errors import RecipeError
from pymerge.recipe import Recipe, expand, parameters_for
from pymerge.recipe.schema import (
    ModelDocument,
    PathDocument,
    RecipeDocument,
    SliceDocument,
    SourceDocument,
)
from pymerge.recipe.values import CONDITION_KEYS

KEYS = st.sampled_from(
    [
        *RecipeDocument.model_fields,
        *SliceDocument.model_fields,
        *SourceDocument.model_fields,
        *ModelDocument.model_fields,
        *PathDocument.model_fields,
        *CONDITION_KEYS,
        *("weight", "density", "normalize", "lambda", "int8_mask", "trim_scope"),
        *("weigth", "zzz", "<<"),
    ]
)
WORDS = st.sampled_from(
    ["linear", "ties", "passthrough", "base", "union", "a@b", "a+b", "*", "1e-5", "float32", "mlp"]
)
SCALARS = (
    WORDS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=2)
    | st.dates()
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)
VALUES = st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=3), WORDS, ANYTHING)
SETTINGS = VALUES | st.lists(st.fixed_dictionaries({"filter": WORDS, "value": VALUES}), max_size=3)
PARAMETERS = st.dictionaries(
    st.sampled_from(["weight", "density", "normalize", "lambda", "scale", "gamma", "weigth"]),
    SETTINGS,
    max_size=3,
)
MODELS = st.sampled_from(["a", "b", "c@d", {"model": "e"}, {"model": {"path": "f"}}]) | ANYTHING
ENTRIES = st.fixed_dictionaries({"model": MODELS}, optional={"parameters": PARAMETERS})
SOURCES = st.fixed_dictionaries(
    {"model": MODELS, "layer_range": st.sampled_from([[0, 2], [1, 3], [2, 1]])},
    optional={"parameters": PARAMETERS},
)
RECIPES = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["linear", "ties", "passthrough", "blend"])},
    optional={
        "models": st.lists(ENTRIES, min_size=1, max_size=3),
        "slices": st.lists(
            st.fixed_dictionaries(
                {"sources": st.lists(SOURCES, min_size=1, max_size=3)},
                optional={"parameters": PARAMETERS, "base_model": MODELS},
            ),
            max_size=2,
        ),
        "base_model": MODELS,
        "parameters": PARAMETERS,
        "dtype": WORDS,
        "zzz": ANYTHING,
    },
)


def ends_well(load, source):
    with contextlib.suppress(RecipeError):
        recipe = load(source)
        assert isinstance(recipe, Recipe)
        for each in expand(recipe, dict.fromkeys(recipe.models, 4)):
            for model in (None, *each.sources):
                parameters_for(
                    recipe, recipe.spec, each, model, output_name="x", input_name="mlp", t=0.5
                )


@given(st.text(max_size=60))
@example('"\\U99999999"')
@example("%YAML " + "9" * 5000 + ".1\n---\na")
@example("a: !!timestamp 2024-99-99")
@example("=: =")
@example("!!map [a]")
@example("&a : *a")
def test_any_text(load, text):
    ends_well(load, text)
    ends_well(load, "merge_method: linear\n" + text)


@given(st.text(st.sampled_from("ab:-?&*!|>%@`{}[],# \n\t'\"\\0~<=.xU"), max_size=40))
@settings(max_examples=300)
def test_any_text_of_yaml_signs(load, text):
    ends_well(load, text + "\n")


@given(ANYTHING)
def test_any_document_as_text(load, document):
    ends_well(load, yaml.safe_dump(document) + "\n")


@given(st.dictionaries(KEYS, ANYTHING, max_size=5))
def test_any_mapping(load, document):
    ends_well(load, document)


@given(RECIPES)
@settings(max_examples=300)
def test_near_recipes(load, document):
    ends_well(load, document)


@pytest.mark.parametrize("place", ["models", "zzz", "parameters", "base_model", "dtype"])
def test_alias_bombs_end_soon(load, place):
    lines = ["merge_method: linear", "bomb0: &b0 [x, x]"]
    lines += [f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 40)]
    inner = "{weight: *b39}" if place == "parameters" else "*b39"
    with pytest.raises(RecipeError):
        load("\n".join([*lines, f"{place}: {inner}"]))
