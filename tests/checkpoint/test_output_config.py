"""output_config: what changes in a donor's config, and that nothing else does."""

from __future__ import annotations

import copy
import json

import pytest

from pymerge.checkpoint import config_json, layer_count, output_config
from pymerge.errors import CheckpointError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "layer_types": ["a", "b", "c", "d"],
    "mlp_only_layers": [0, 3],
    "eos_token_id": [1, 2, 3, 4],
    "some_layers": [1, 2],
    "torch_dtype": "float32",
    "quantization_config": None,
    "vocab_size": 9,
}


def out(config, formats=None, num_layers=None, layer_sources=None, tied=None):
    before = copy.deepcopy(config)
    result = output_config(
        config, formats=formats or {}, num_layers=num_layers, layer_sources=layer_sources, tied=tied
    )
    assert config == before
    return result


def test_nothing_asked_changes_nothing_but_the_quantisation():
    expected = {key: value for key, value in LLAMA.items() if key != "quantization_config"}
    result = out(LLAMA)
    assert result == expected
    assert list(result) == list(expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "x"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "x"}, {"dtype": "bfloat16"}),
        ({"dtype": "x", "torch_dtype": "y"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"text_config": {"dtype": "x"}}, {"text_config": {"dtype": "bfloat16"}}),
        (
            {"dtype": "x", "text_config": {"torch_dtype": "x"}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}},
        ),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_dtype_names_the_format_of_most_bytes(config, expected):
    assert out(config, {"float32": 10, "bfloat16": 11, "int64": 99}) == expected


def test_only_integers_written_leave_the_dtype():
    assert out({"dtype": "x"}, {"int64": 5}) == {"dtype": "x"}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_layer_count_key(key):
    assert out({key: 4}, num_layers=7) == {key: 7}
    assert out({"text_config": {key: 4}}, num_layers=7) == {"text_config": {key: 7}}
    assert layer_count({key: 4}) == layer_count({"text_config": {key: 4}}) == 4


def test_lists_follow_their_layers():
    result = out(LLAMA, num_layers=5, layer_sources=[0, 1, 3, 1, 3])
    assert result["num_hidden_layers"] == 5
    assert result["layer_types"] == ["a", "b", "d", "b", "d"]
    assert result["mlp_only_layers"] == [0, 2, 4]
    assert result["eos_token_id"] == [1, 2, 3, 4]
    assert result["some_layers"] == [1, 2]


def test_nested_lists_follow_too_and_other_parts_stay():
    config = {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]},
        "vision_config": {"num_hidden_layers": 2, "layer_types": ["p", "q"]},
    }
    result = out(config, num_layers=1, layer_sources=[1])
    assert result["text_config"] == {"num_hidden_layers": 1, "layer_types": ["y"]}
    assert result["vision_config"] == config["vision_config"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 3}, "expected a layer count"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers.*positive integer.*'4'"),
        ({"num_hidden_layers": True}, "positive integer"),
        ({"num_layers": 0}, "positive integer"),
        ({"num_hidden_layers": 2, "layer_types": ["x", "y"]}, "layer_types.*layer 5"),
    ],
)
def test_what_cannot_be_expressed(config, words):
    with pytest.raises(CheckpointError, match=words):
        out(config, num_layers=1, layer_sources=[5])


def test_tie_flag_is_set_wherever_it_stands():
    assert out({}, tied=False) == {"tie_word_embeddings": False}
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    expected = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    assert out(config, tied=False) == expected
    assert out({"text_config": {}}, tied=True) == {"text_config": {}, "tie_word_embeddings": True}


def test_hostile_nesting():
    config = {}
    for _ in range(900):
        config = {"a": config}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        output_config(config, formats={}, num_layers=None, layer_sources=None, tied=None)


def test_no_config_has_no_layers():
    assert layer_count(None) is None
    assert layer_count({"hidden_size": 1}) is None


def test_written_text_reads_back():
    config = {"b": float("inf"), "a": "é\ud800", "n": [1, None]}
    assert json.loads(config_json(config)) == config
    assert config_json({"a": 1}) == b'{\n  "a": 1\n}\n'
