"""Recipes over the parts of a model; what belongs where is worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint import set_part_layers
from pymerge.errors import CheckpointError, PlanError
from pymerge.plan.modules import role_of

VISION = "model.vision_tower.encoder.layers"


def write_model(folder: Path, value: float, *, text: int = 2, vision: int = 3) -> Path:
    """A text model with a vision tower; layer n of each is filled with value + n."""
    value = float(value)
    folder.mkdir()
    tensors = {"model.language_model.embed_tokens.weight": torch.full((4, 2), value)}
    for layer in range(text):
        name = f"model.language_model.layers.{layer}.mlp.weight"
        tensors[name] = torch.full((2, 2), value + layer)
    for layer in range(vision):
        tensors[f"{VISION}.{layer}.mlp.weight"] = torch.full((2, 2), value + layer)
    tensors["model.vision_tower.post_layernorm.weight"] = torch.full((2,), value)
    tensors["model.multi_modal_projector.0.weight"] = torch.full((2,), value)
    tensors["lm_head.weight"] = torch.full((4, 2), value)
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "architectures": ["TestForConditionalGeneration"],
        "text_config": {"num_hidden_layers": text, "layer_types": ["full"] * text},
        "vision_config": {"depth": vision, "fullatt_block_indexes": [1]},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    return str(write_model(tmp_path / "a", 100)), str(write_model(tmp_path / "b", 200))


def merged(recipe: dict, out: Path) -> tuple[dict[str, float], dict, pymerge.MergeReport]:
    """The first element of every tensor, the configuration, the report."""
    report = pymerge.merge(recipe, out)
    tensors = {k: t.flatten()[0].item() for k, t in load_file(out / "model.safetensors").items()}
    return tensors, json.loads((out / "config.json").read_text()), report


def test_every_layer_stack_has_gradients_of_its_own(
    models: tuple[str, str], tmp_path: Path
) -> None:
    a, b = models
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": a, "parameters": {"weight": [1.0, 0.0]}},
            {"model": b, "parameters": {"weight": [0.0, 1.0]}},
        ],
    }
    tensors, _, _ = merged(recipe, tmp_path / "out")
    text = [tensors[f"model.language_model.layers.{n}.mlp.weight"] for n in range(2)]
    assert text == [100, 201]
    assert [tensors[f"{VISION}.{n}.mlp.weight"] for n in range(3)] == [100, 151, 202]
    outside = [value for name, value in tensors.items() if "layers" not in name]
    assert outside == [100] * 4  # the projector's only number is no stack of layers


def test_parameters_of_a_module_stand_between_slice_and_top_level(
    models: tuple[str, str], tmp_path: Path
) -> None:
    a, b = models
    sources = [{"model": m, "layer_range": [0, 2]} for m in (a, b)]
    recipe = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"slices": [{"sources": sources, "parameters": {"weight": 1.0}}]},
            "vision_tower": {
                "models": [{"model": a, "parameters": {"weight": 3.0}}, {"model": b}],
                "parameters": {"weight": 1.0},
            },
            "multi_modal_projector": {"models": [{"model": a}, {"model": b}]},
        },
        "parameters": {"weight": [{"filter": "projector", "value": 2.0}, {"value": 77.0}]},
    }
    recipe["modules"]["text_decoder"]["slices"][0]["sources"][0]["parameters"] = {"weight": 4.0}
    tensors, _, report = merged(recipe, tmp_path / "out")
    assert tensors["model.language_model.layers.0.mlp.weight"] == 120
    assert tensors["lm_head.weight"] == 120
    assert tensors["model.vision_tower.post_layernorm.weight"] == 125
    assert tensors["model.multi_modal_projector.0.weight"] == 150
    assert not report.warnings


def test_slices_of_a_part_change_its_own_layer_count(
    models: tuple[str, str], tmp_path: Path
) -> None:
    a, b = models
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 3]}]},
    ]
    recipe = {"merge_method": "passthrough", "modules": {"vision_tower": {"slices": slices}}}
    tensors, config, report = merged(recipe, tmp_path / "out")
    assert [tensors[f"{VISION}.{n}.mlp.weight"] for n in range(4)] == [100, 101, 201, 202]
    assert config["vision_config"] == {"depth": 4, "fullatt_block_indexes": [1, 2]}
    assert config["text_config"]["num_hidden_layers"] == 2
    # The rest is the donor's, which is the first model.
    assert tensors["model.language_model.layers.1.mlp.weight"] == 101
    assert any("5 tensors of no module that the recipe names" in t for t in report.warnings)


def test_a_module_is_a_prefix_and_default_the_rest(models: tuple[str, str], tmp_path: Path) -> None:
    a, b = models
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "vision_tower.encoder": {"models": [{"model": b}]},
            "default": {"slices": [{"sources": [{"model": a, "layer_range": [1, 2]}]}]},
        },
    }
    tensors, config, _ = merged(recipe, tmp_path / "out")
    assert [tensors[f"{VISION}.{n}.mlp.weight"] for n in range(3)] == [200, 201, 202]
    assert tensors["model.vision_tower.post_layernorm.weight"] == 100
    assert tensors["model.language_model.layers.0.mlp.weight"] == 101
    assert config["text_config"] == {"num_hidden_layers": 1, "layer_types": ["full"]}


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ({"text_decodr": "models"}, r"no tensor of .*did you mean 'text_decoder'\?"),
        ({"encoder": "models"}, "belong to multi_modal_projector, text_decoder, vision_model"),
        ({"multi_modal_projector": [0, 2]}, "which has 1 layers"),
        ({"vision_tower": [0, 9]}, r"layers 0 to 9 .* which has 3 layers"),
        ({"model.vision_tower.post_layernorm": [0, 0]}, "use models instead of slices"),
    ],
)
def test_modules_that_do_not_fit(
    models: tuple[str, str], modules: dict[str, object], sentence: str
) -> None:
    a, _ = models
    content = {
        name: {"models": [{"model": a}]}
        if kind == "models"
        else {"slices": [{"sources": [{"model": a, "layer_range": kind}]}]}
        for name, kind in modules.items()
    }
    with pytest.raises(PlanError, match=sentence):
        pymerge.plan({"merge_method": "passthrough", "modules": content})


def test_models_of_a_module_have_equally_many_layers(
    models: tuple[str, str], tmp_path: Path
) -> None:
    a, _ = models
    deep = str(write_model(tmp_path / "deep", 1, vision=5))
    both = {"models": [{"model": m, "parameters": {"weight": 1}} for m in (a, deep)]}
    pymerge.plan({"merge_method": "linear", "modules": {"text_decoder": both}})
    with pytest.raises(PlanError, match="equally many layers"):
        pymerge.plan({"merge_method": "linear", "modules": {"vision_tower": both}})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.mlp.weight", "text"),
        ("language_model.model.layers.0.mlp.weight", "text"),
        ("visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "projector"),
        ("vision_model.vision_adapter.mlp.fc1.weight", "vision"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("model.decoder.layers.0.fc1.weight", "decoder"),
        ("shared.weight", "text"),
        ("lm_head.weight", "text"),
        ("audio_tower.layers.0.fc1.weight", "audio"),
    ],
)
def test_the_part_that_a_tensor_belongs_to(name: str, role: str) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize(
    ("config", "part", "before", "sources", "expected"),
    [
        (
            {"is_encoder_decoder": True, "num_layers": 3, "num_decoder_layers": 3},
            "encoder",
            3,
            (0, 1),
            {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3},
        ),
        (
            {"is_encoder_decoder": True, "num_layers": 3},
            "encoder",
            3,
            (0, 1),
            {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3},
        ),
        (
            {"is_encoder_decoder": True, "num_layers": 3},
            "decoder",
            3,
            (0, 1),
            {"is_encoder_decoder": True, "num_layers": 3, "num_decoder_layers": 2},
        ),
        (
            {"encoder_layers": 3, "num_hidden_layers": 3, "decoder_layers": 2},
            "encoder",
            3,
            (0, 1, 1, 2),
            {"encoder_layers": 4, "num_hidden_layers": 4, "decoder_layers": 2},
        ),
        ({"num_hidden_layers": 3}, "decoder", 3, (0,), {"num_hidden_layers": 1}),
        (
            {"vision_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]}},
            "vision",
            2,
            (1, 1, 0),
            {"vision_config": {"num_hidden_layers": 3, "layer_types": ["y", "y", "x"]}},
        ),
    ],
)
def test_where_the_layer_count_of_a_part_stands(
    config: dict, part: str, before: int, sources: tuple[int, ...], expected: dict
) -> None:
    set_part_layers(config, part, before, sources)
    assert config == expected


def test_a_part_without_a_layer_count_cannot_be_rebuilt() -> None:
    with pytest.raises(CheckpointError, match="layer count of 2 for the vision"):
        set_part_layers({"vision_config": {"depth": 7}}, "vision", 2, (0,))
