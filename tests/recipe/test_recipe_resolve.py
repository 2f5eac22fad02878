"""What the planner asks: slices, precedence, defaults, filters. Tables are worked out by hand."""

import time

import pytest

from pymerge.errors import PlanError, RecipeError
from pymerge.recipe import ModelRef, expand, parameters_for, position, unmatched_filters

A, B, C = ModelRef("a"), ModelRef("b"), ModelRef("c")
NAME = "model.layers.3.mlp.up_proj.weight"


def values(recipe, model=None, *, index=0, output=NAME, source_name=NAME, t=0.0, layers=8):
    """Per-model values with a model, shared values without; with the origins."""
    each = expand(recipe, dict.fromkeys(recipe.models, layers))[index]
    source = next((s for s in each.sources if s.model == model), None)
    assert (source is None) == (model is None)
    origins = {}
    found = parameters_for(
        recipe,
        recipe.spec,
        each,
        source,
        output_name=output,
        input_name=source_name,
        t=t,
        origins=origins,
    )
    assert {key: each.value for key, each in origins.items()} == found
    return found, {key: each.origin for key, each in origins.items()}


def linear(load, **rest):
    return load({"merge_method": "linear", "parameters": {"weight": 1}, **rest})


def test_whole_models_are_one_slice(load):
    recipe = linear(load, models=[{"model": "a"}, {"model": "b"}])
    (each,) = expand(recipe, {A: 5, B: 5})
    assert [(s.model, s.start, s.stop, s.index) for s in each.sources] == [
        (A, 0, 5, 0),
        (B, 0, 5, 1),
    ]
    assert (each.base, each.index, each.num_layers) == (None, 0, 5)
    (flat,) = expand(recipe, {A: None, B: None})
    assert [s.stop for s in flat.sources] == [None, None]
    assert flat.num_layers is None


def test_whole_models_of_different_depth(load):
    recipe = linear(load, models=[{"model": "a"}, {"model": "b"}])
    with pytest.raises(PlanError, match=r"equally many layers, found a 5, b 6; .* slices"):
        expand(recipe, {A: 5, B: 6})
    with pytest.raises(PlanError, match="found a 5, b none"):
        expand(recipe, {A: 5, B: None})


def test_an_unlisted_base_is_the_last_source_and_the_first_model(load):
    recipe = load(
        {
            "merge_method": "ties",
            "base_model": "c",
            "models": [{"model": "a"}, {"model": "b"}],
            "parameters": {"weight": 1},
        }
    )
    assert recipe.models == (C, A, B)
    assert recipe.donor == C
    (each,) = expand(recipe, dict.fromkeys(recipe.models, 4))
    assert [s.model for s in each.sources] == [A, B, C]
    assert each.base == C
    assert values(recipe, C) == ({}, {})


def test_a_listed_base_stays_in_its_place(load):
    recipe = load(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
            "parameters": {"weight": 1},
        }
    )
    assert recipe.models == (A, B, C)
    (each,) = expand(recipe, dict.fromkeys(recipe.models, 4))
    assert [s.model for s in each.sources] == [A, B, C]


SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [2, 6]}
  - sources: [{model: c, layer_range: [3, 3]}]
  - sources: [{model: a, layer_range: [7, 8]}]
parameters: {weight: 1}
"""


def test_slices(load):
    recipe = load(SLICES)
    assert recipe.models == (A, B, C)
    first, empty, last = expand(recipe, {A: 8, B: 6, C: 3})
    assert [(s.model, s.start, s.stop) for s in first.sources] == [(A, 0, 4), (B, 2, 6)]
    assert [first.num_layers, empty.num_layers, last.num_layers] == [4, 0, 1]
    assert [first.index, empty.index, last.index] == [0, 1, 2]


def test_layers_out_of_range(load):
    recipe = load(SLICES)
    with pytest.raises(
        PlanError,
        match=r"slices\[0\]\.sources\[1\] \(line 5\): layers 2 to 6 .* of b, which has 5 layers",
    ):
        expand(recipe, {A: 8, B: 5, C: 3})
    with pytest.raises(PlanError, match="of a, which has no numbered layers"):
        expand(recipe, {A: None, B: 6, C: 3})


PRECEDENCE = """\
merge_method: ties
base_model: c
slices:
  - sources:
      - {model: c, layer_range: [0, 4]}
      - model: a
        layer_range: [0, 4]
        parameters: {weight: 3}
      - model: b
        layer_range: [0, 4]
        parameters: {weight: {filter: attn, value: 4}}
    parameters:
      weight: {filter: mlp, value: 2}
      normalize: false
  - sources:
      - {model: c, layer_range: [4, 8]}
      - {model: b, layer_range: [4, 8]}
parameters: {weight: 1, lambda: 0.5}
"""

ATTN, MLP, NORM = "layers.0.attn.weight", "layers.0.mlp.weight", "norm.weight"


@pytest.mark.parametrize(
    ("model", "index", "name", "weight", "origin"),
    [
        (A, 0, MLP, 3.0, "slices[0].sources[1].parameters.weight (line 8)"),
        (B, 0, ATTN, 4.0, "slices[0].sources[2].parameters.weight.value (line 11)"),
        (B, 0, MLP, 2.0, "slices[0].parameters.weight.value (line 13)"),
        (B, 0, NORM, 1.0, "parameters.weight (line 18)"),
        (B, 1, MLP, 1.0, "parameters.weight (line 18)"),
    ],
    ids=["source", "source filter", "slice filter", "falls through", "other slice"],
)
def test_precedence_of_per_model_parameters(load, model, index, name, weight, origin):
    found, origins = values(load(PRECEDENCE), model, index=index, output="-", source_name=name)
    assert found == {"weight": weight, "density": 1.0}
    assert origins == {"weight": origin, "density": "default"}


@pytest.mark.parametrize(("index", "normalize"), [(0, False), (1, True)])
def test_precedence_of_shared_parameters(load, index, normalize):
    found, origins = values(load(PRECEDENCE), index=index)
    assert found == {"normalize": normalize, "lambda": 0.5, "trim_scope": "tensor"}
    assert origins["lambda"] == "parameters.lambda (line 18)"
    assert origins["trim_scope"] == "default"
    assert origins["normalize"] == (
        "slices[0].parameters.normalize (line 14)" if index == 0 else "default"
    )


def test_filters_match_input_names_per_model_and_output_names_when_shared(load):
    recipe = load(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "a"}],
            "parameters": {
                "weight": [{"filter": "inner", "value": 2}, {"value": 1}],
                "lambda": [{"filter": "outer", "value": 2}, {"value": 1}],
            },
        }
    )
    names = {"output": "outer", "source_name": "inner"}
    assert values(recipe, A, **names)[0]["weight"] == 2
    assert values(recipe, **names)[0]["lambda"] == 2
    swapped = {"output": "inner", "source_name": "outer"}
    assert values(recipe, A, **swapped)[0]["weight"] == 1
    assert values(recipe, **swapped)[0]["lambda"] == 1


def test_an_empty_list_falls_through(load):
    recipe = linear(load, models=[{"model": "a", "parameters": {"weight": []}}])
    assert values(recipe, A)[0] == {"weight": 1.0}
    recipe = linear(
        load,
        models=[
            {
                "model": "a",
                "parameters": {"weight": [{"filter": "mlp", "value": []}, {"value": 9}]},
            }
        ],
    )
    assert values(recipe, A, source_name=MLP)[0] == {"weight": 1.0}
    assert values(recipe, A, source_name=ATTN)[0] == {"weight": 9.0}


def test_gradients_follow_the_position(load):
    recipe = linear(load, models=[{"model": "a", "parameters": {"weight": [1, 2, 4]}}])
    found = [values(recipe, A, t=position(k, 4))[0]["weight"] for k in range(4)]
    assert found == pytest.approx([1, 5 / 3, 8 / 3, 4])


def test_a_missing_required_parameter(load):
    recipe = load("merge_method: linear\nmodels:\n  - model: a\n  - model: b\n")
    with pytest.raises(RecipeError) as caught:
        values(recipe, B)
    assert str(caught.value) == (
        "models[1] (line 4): linear needs the parameter 'weight' for each model and the recipe "
        f"gives none for the model b, tensor {NAME!r}; write it beside the model, as in "
        "'- model: b' followed by 'parameters: {weight: 0.5}', or once for all models under the "
        "top-level parameters"
    )


def test_an_unlisted_base_of_linear_needs_a_weight(load):
    recipe = load(
        {
            "merge_method": "linear",
            "base_model": "b",
            "models": [{"model": "a", "parameters": {"weight": 1}}],
        }
    )
    assert values(recipe, A)[0] == {"weight": 1.0}
    with pytest.raises(RecipeError, match="takes base_model as an ordinary input; list it under"):
        values(recipe, B)


def test_a_listed_base_of_linear_is_an_ordinary_input(load):
    recipe = load(
        {
            "merge_method": "linear",
            "base_model": "a",
            "models": [{"model": "a", "parameters": {"weight": 7}}],
        }
    )
    assert recipe.warnings == ()
    assert values(recipe, A)[0] == {"weight": 7.0}


def test_a_parameter_with_a_default_may_be_left_out(load):
    recipe = load({"merge_method": "passthrough", "models": [{"model": "a"}]})
    assert values(recipe, A) == ({"scale": 1.0}, {"scale": "default"})


def test_unmatched_filters(load):
    recipe = load(
        """\
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: self_atn, value: 1}
        - {filter: mlp.donw_proj, value: 1}
        - {filter: self_attn, value: 1}
        - {filter: qqqq, value: 1}
        - {filter: "*", value: 1}
parameters:
  normalize: {filter: lm_haed, value: true}
"""
    )
    names = [
        f"model.layers.{k}.{part}.weight"
        for k in range(3)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert unmatched_filters(recipe, iter([*names, "lm_head.weight"])) == [
        "parameters.normalize.filter (line 12): no tensor has 'lm_haed' in its name; "
        "did you mean 'lm_head'?",
        "models[0].parameters.weight[0].filter (line 6): no tensor has 'self_atn' in its name; "
        "did you mean 'self_attn'?",
        "models[0].parameters.weight[1].filter (line 7): no tensor has 'mlp.donw_proj' in its "
        "name; did you mean 'mlp.down_proj'?",
        "models[0].parameters.weight[3].filter (line 9): no tensor has 'qqqq' in its name",
    ]


def test_twenty_thousand_tensors_take_about_a_second(load):
    condition = [{"filter": "attn", "value": [0.1, 0.9]}, {"filter": "mlp", "value": 1}]
    recipe = load(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": f"m{i}", "parameters": {"weight": condition, "density": [0, 1]}}
                for i in range(4)
            ],
            "parameters": {"weight": 1, "lambda": [1, 2]},
        }
    )
    (each,) = expand(recipe, dict.fromkeys(recipe.models, 100))
    start = time.process_time()
    for k in range(20_000):
        name, t = f"model.layers.{k % 100}.other.{k}.weight", k % 100 / 99
        parameters_for(recipe, recipe.spec, each, None, output_name=name, input_name=name, t=t)
        for source in each.sources:
            parameters_for(
                recipe, recipe.spec, each, source, output_name=name, input_name=name, t=t
            )
    seconds = time.process_time() - start
    # Generous for slow machines; a parse or a validation per tensor would take minutes.
    assert seconds < 5, f"{seconds:.2f} s"
