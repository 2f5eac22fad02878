"""Settings: gradients, conditions, kinds. Expected: by hand, or numpy.interp."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymerge.errors import RecipeError
from pymerge.methods.spec import ParameterSpec
from pymerge.recipe import position
from pymerge.recipe.findings import Findings
from pymerge.recipe.values import compile_setting, resolve

NUMBER = ParameterSpec("weight", "float", "model", None, "")
BOUNDED = ParameterSpec("density", "float", "model", 1.0, "", minimum=0.0, maximum=1.0)
WHOLE = ParameterSpec("steps", "int", "shared", 10, "")
SWITCH = ParameterSpec("normalize", "bool", "shared", True, "")
WORD = ParameterSpec("trim_scope", "str", "shared", "tensor", "", choices=("tensor", "model"))
FREE_WORD = ParameterSpec("label", "str", "shared", "x", "")


def value(raw, spec=NUMBER, name="model.layers.0.mlp.weight", t=0.0):
    findings = Findings()
    setting = compile_setting(raw, spec, (spec.name,), findings)
    if findings.errors:
        raise findings.as_error()
    found = resolve(setting, name, t) if setting else None
    return None if found is None else found.value


@pytest.mark.parametrize(
    ("layer", "expected"), [(0, 1.0), (1, 5 / 3), (2, 8 / 3), (3, 4.0)], ids=str
)
def test_gradient_over_four_layers(layer, expected):
    assert value([1, 2, 4], t=position(layer, 4)) == pytest.approx(expected, rel=1e-15)


def test_position_of_layers():
    assert [position(k, 5) for k in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert position(0, 1) == 1.0
    assert value([1, 2, 4], t=position(0, 1)) == 4.0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    st.floats(0, 1),
)
def test_gradient_agrees_with_numpy(values, t):
    expected = np.interp(t * (len(values) - 1), np.arange(len(values)), values)
    found = value(values, t=t)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert min(values) <= found <= max(values)


def test_gradient_ends_are_exact():
    assert value([0.1, 0.7, 0.3], t=0.0) == 0.1
    assert value([0.1, 0.7, 0.3], t=0.5) == 0.7
    assert value([0.1, 0.7, 0.3], t=1.0) == 0.3


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_gradient_of_one_value_is_constant(t):
    assert value([0.25], t=t) == 0.25


@given(st.floats(0, 1))
def test_words_and_booleans_take_the_value_at_or_before(t):
    words = ["tensor", "model", "tensor"]
    assert value(words, WORD, t=t) == words[math.floor(t * 2)]
    switches = [True, False, False, True]
    assert value(switches, SWITCH, t=t) is switches[math.floor(t * 3)]


def test_whole_numbers_interpolate_only_onto_whole_numbers():
    assert value([10, 20], WHOLE, t=0.5) == 15
    assert isinstance(value([10, 20], WHOLE, t=0.5), int)
    with pytest.raises(RecipeError, match=r"gradient of the whole number steps gives 12\.5"):
        value([10, 20], WHOLE, t=0.25)


@pytest.mark.parametrize("raw", [[], {"filter": "mlp", "value": []}], ids=["list", "condition"])
def test_empty_list_is_unset(raw):
    assert value(raw) is None


def test_first_matching_condition_wins():
    raw = [
        {"filter": "self_attn", "value": 0.1},
        {"filter": "layers.0", "value": 0.2},
        {"filter": "mlp", "value": 0.3},
        {"value": 0.4},
    ]
    assert value(raw, name="model.layers.0.self_attn.q_proj.weight") == 0.1
    assert value(raw, name="model.layers.0.mlp.up_proj.weight") == 0.2
    assert value(raw, name="model.layers.1.mlp.up_proj.weight") == 0.3
    assert value(raw, name="model.norm.weight") == 0.4


def test_filters_are_case_sensitive_substrings_and_not_patterns():
    assert value({"filter": "MLP", "value": 1}) is None
    assert value({"filter": "l.p", "value": 1}) is None
    assert value({"filter": "ayers.0.ml", "value": 1}) == 1
    assert value({"filter": "*", "value": 1}) == 1
    assert value({"filter": 0, "value": 1}) == 1
    assert value({"filter": "mlp", "value": [1, 3]}, t=0.5) == 2


@pytest.mark.parametrize(
    ("raw", "spec", "expected"),
    [
        ("1e-5", NUMBER, 1e-5),
        (" 0.5 ", NUMBER, 0.5),
        (["1e-1", 0.3], NUMBER, 0.1),
        (3, NUMBER, 3.0),
        (3.4028235677973362e38, NUMBER, 3.4028235677973362e38),
        (3.0, WHOLE, 3),
        ("3", WHOLE, 3),
        (2**53 + 1, WHOLE, 2**53 + 1),
        (1, SWITCH, True),
        (0.0, SWITCH, False),
        ("No", SWITCH, False),
        ("model", WORD, "model"),
        ("anything", FREE_WORD, "anything"),
        (0, BOUNDED, 0.0),
        (1, BOUNDED, 1.0),
    ],
    ids=str,
)
def test_accepted(raw, spec, expected):
    found = value(raw, spec)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("raw", "spec", "sentence"),
    [
        (None, NUMBER, r"weight: weight has no value"),
        ("heavy", NUMBER, r"weight: weight is a number, found 'heavy'"),
        (True, NUMBER, r"is a number, found True \(yes, no, on and off are YAML booleans\)"),
        (float("nan"), NUMBER, r"finite, found nan"),
        ("inf", NUMBER, r"finite, found 'inf'"),
        (10**400, NUMBER, r"weight is a number, found 1000"),
        (1e300, NUMBER, r"weight is a number and finite in float32, found 1e\+300"),
        ([0.5, "-3.5e38"], NUMBER, r"weight\[1\]: .* finite in float32, found '-3\.5e38'"),
        (1.5, BOUNDED, r"density is at most 1, found 1\.5"),
        ([0.5, -0.1], BOUNDED, r"density\[1\]: density is at least 0, found -0\.1"),
        (1.5, WHOLE, r"steps is a whole number, found 1\.5"),
        (2, SWITCH, r"normalize is true or false, found 2"),
        ("maybe", SWITCH, r"true or false, found 'maybe'"),
        ("layer", WORD, r"trim_scope is a word out of tensor, model, found 'layer'"),
        (True, FREE_WORD, r"label is a word, found True; put quotes"),
        ([[1]], NUMBER, r"weight\[0\]: weight is a number, found \[1\]"),
        ([1, {"filter": "x", "value": 1}], NUMBER, r"weight\[0\]: expected \{filter, value\}"),
        ({"filter": "x"}, NUMBER, r"weight: a condition needs a 'value'"),
        ({"filter": True, "value": 1}, NUMBER, r"weight\.filter: .* found True; quote it"),
        ({"filtre": "x", "value": 1}, NUMBER, r"weight\.filtre: .* did you mean 'filter'\?"),
        ({"value": {"value": 1}}, NUMBER, r"weight\.value: weight is a number, found a mapping"),
    ],
    ids=str,
)
def test_refused(raw, spec, sentence):
    with pytest.raises(RecipeError, match=sentence):
        value(raw, spec)


def test_unreachable_conditions_are_a_warning():
    findings = Findings()
    raw = [{"filter": "a", "value": 1}, {"value": 2}, {"filter": "b", "value": 3}]
    assert compile_setting(raw, NUMBER, ("weight",), findings) is not None
    assert not findings.errors
    assert len(findings.warnings) == 1
    assert findings.warnings[0].startswith("weight[2]: is never reached")
