"""``modules``: what stands in one, where its mistakes are, and which scope gives a value."""

import pytest

from pymerge.errors import RecipeError
from pymerge.recipe import ModelRef, expand, parameters_for

RECIPE = """\
merge_method: ties
base_model: base
modules:
  text_decoder:
    slices:
      - sources:
          - {model: base, layer_range: [0, 2]}
          - {model: left, layer_range: [2, 4], parameters: {density: 0.5}}
        parameters: {weight: 0.1}
    parameters: {weight: 0.2, lambda: 0.3}
  vision_tower:
    models:
      - model: left
parameters: {weight: 0.7, normalize: false}
"""


def resolved(recipe, number):
    """Per-model values of ``left`` and shared values in a module, each with its origin."""
    module = recipe.modules[number]
    (each,) = expand(module, dict.fromkeys(recipe.models, 8))
    (left,) = (source for source in each.sources if source.model == ModelRef("left"))
    found = []
    for source in (left, None):
        origins = {}
        names = {"output_name": "x", "input_name": "x"}
        values = parameters_for(recipe, recipe.spec, each, source, **names, t=0.0, origins=origins)
        found.append({key: (values[key], origins[key].origin) for key in values})
    return found


def test_a_module_stands_between_its_slices_and_the_top_level(load):
    recipe = load(RECIPE)
    assert [module.name for module in recipe.modules] == ["text_decoder", "vision_tower"]
    model, shared = resolved(recipe, 0)
    slices = "modules.text_decoder.slices[0]"
    assert model["weight"] == (0.1, f"{slices}.parameters.weight (line 9)")
    assert model["density"] == (0.5, f"{slices}.sources[1].parameters.density (line 8)")
    assert shared["lambda"] == (0.3, "modules.text_decoder.parameters.lambda (line 10)")
    assert shared["normalize"] == (False, "parameters.normalize (line 14)")
    model, shared = resolved(recipe, 1)
    assert model["weight"] == (0.7, "parameters.weight (line 14)")
    assert shared["lambda"][0] == 1.0


def test_the_base_is_added_to_the_models_of_a_module_and_named_once(load):
    recipe = load(RECIPE)
    (vision,) = recipe.modules[1].slices
    assert [str(source.model) for source in vision.sources] == ["left", "base"]
    assert [source.appended for source in vision.sources] == [False, True]
    assert recipe.models == (ModelRef("base"), ModelRef("left"))
    assert recipe.donor == ModelRef("base")
    assert not recipe.whole_models


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("lambda: 0.3", "lamda: 0.3", r"modules\.text_decoder\.parameters\.lamda \(line 10\)"),
        ("    models:\n", "    modles:\n", r"vision_tower\.modles .*did you mean 'models'"),
        ("    models:\n", "    slices: []\n    x:\n", "exactly one of models, slices"),
        ("[2, 4]", "[2, 3]", r"text_decoder\.slices\[0\] .*equally many layers"),
        ("model: left\n", "model: base\n", r"modules\.vision_tower\.models .*ties takes 1 or more"),
        ("modules:\n", "models: [{model: left}]\nmodules:\n", "found models and modules"),
        ("    models:\n", "    weight: 1\n    models:\n", "belongs under 'parameters'"),
    ],
)
def test_mistakes_are_found_with_their_place(load, old, new, sentence):
    assert RECIPE.count(old) == 1
    with pytest.raises(RecipeError, match=sentence):
        load(RECIPE.replace(old, new))
