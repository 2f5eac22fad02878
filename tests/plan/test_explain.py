"""What explain says, against recipes worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import pymerge
from pymerge.errors import PlanError
from pymerge.report.groups import drawn_together, grouped

LAYERS = 5
MODULES = {"mlp.up_proj.weight": (8, 6), "self_attn.q_proj.weight": (6, 6)}
RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0, 1, 0.5]
        - value: 0.25
  - model: b
    parameters: {density: 0.5}
parameters:
  weight: 0.75
  density:
    - filter: lm_head
      value: 0.9
    - filter: mlp
      value: 0.6
    - value: 1
  lambda: {filter: nothing.like.this, value: 2}
  int8_mask: true
dtype: float16
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base, a and b in the current folder, with five layers."""
    shapes = {"model.embed_tokens.weight": (7, 6), "lm_head.weight": (7, 6)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{module}": shape for module, shape in MODULES.items()}
    for number, name in enumerate(("base", "a", "b")):
        tensors = {k: np.full(shape, number, np.float32) for k, shape in shapes.items()}
        tensors["model.positions"] = np.arange(4)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": LAYERS}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(values):
    """Name → (value, origin) of what the recipe says."""
    return {v.name: (v.value, v.origin) for v in values if v.origin != "default"}


FROM_WEIGHT = "models[0].parameters.weight[{}].value (line {})"
FROM_DENSITY = "parameters.density[{}].value (line {})"


def test_values_and_where_they_come_from(models):
    found = pymerge.explain(RECIPE)["model.layers.3.mlp.up_proj.weight"]
    base, a, b = found.inputs
    assert (base.role, base.model, base.parameters) == ("base", "base", ())
    assert given(a.parameters) == {
        "weight": (0.25, FROM_WEIGHT.format(1, 9)),
        "density": (0.6, FROM_DENSITY.format(1, 18)),
    }
    assert given(b.parameters) == {
        "weight": (0.75, "parameters.weight (line 13)"),
        "density": (0.5, "models[1].parameters.density (line 11)"),
    }
    assert given(found.parameters) == {}  # lambda's filter does not hold here
    assert {v.name: v.value for v in found.parameters}["lambda"] == 1.0
    assert (found.kind, found.layer, found.format) == ("merged", 3, "F16")
    assert (a.tensor, a.file, a.format, a.made) == (found.name, "model.safetensors", "F32", "")
    assert found.bytes_read == 3 * 48 * 4
    assert found.bytes_written == 48 * 2


@pytest.mark.parametrize(("layer", "value"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.75), (4, 0.5)])
def test_a_gradient_says_its_position(models, layer, value):
    found = pymerge.explain(RECIPE)[f"model.layers.{layer}.self_attn.q_proj.weight"]
    weight = next(v for v in found.inputs[1].parameters if v.name == "weight")
    assert weight.value == value
    assert weight.origin == FROM_WEIGHT.format(0, 8)
    assert (weight.filter, weight.gradient) == ("self_attn", (0.0, 1.0, 0.5))
    assert weight.position == layer / 4


def test_what_does_nothing_is_said(models):
    found = pymerge.explain(RECIPE)
    assert found.unused == (
        "parameters.lambda.value (line 20): no tensor takes its lambda from here",
    )
    (mask,) = found.without_effect
    assert mask.startswith("parameters.int8_mask (line 21): ")
    assert "changes nothing" in mask


def test_presets_are_an_origin(models):
    recipe = RECIPE.replace("lambda: {filter: nothing.like.this, value: 2}", "preset: peft")
    found = pymerge.explain(recipe, "lm_head").tensors[0]
    origins = {v.name: v.origin for v in found.parameters}
    assert origins["preset"] == "parameters.preset (line 20)"
    assert "preset peft" in origins.values()


def test_copies_say_why(models):
    found = pymerge.explain(RECIPE)["model.positions"]
    assert found.kind == "copied"
    assert "not floating point" in found.note
    assert not list(found.values)


def test_an_adapter_is_said(models, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    matrices = {"A": (2, 6), "B": (8, 2)}
    save_file(
        {f"{prefix}.lora_{k}.weight": np.ones(v, np.float32) for k, v in matrices.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = pymerge.explain(RECIPE.replace("model: a\n", "model: base+adapter\n"))
    changed = found["model.layers.1.mlp.up_proj.weight"].inputs[1]
    assert changed.made == "LoRA of rank 2 put on, scale 1.5"
    assert found["model.layers.2.mlp.up_proj.weight"].inputs[1].made == ""


def test_one_tensor_or_those_with_a_part(models):
    name = "model.layers.1.mlp.up_proj.weight"
    assert [t.name for t in pymerge.explain(RECIPE, name).tensors] == [name]
    assert len(pymerge.explain(RECIPE, "up_proj").tensors) == LAYERS
    with pytest.raises(PlanError, match=r"did you mean 'lm_head.weight'"):
        pymerge.explain(RECIPE, "lm_heat.weight")


def test_slices_name_the_layers_that_tensors_come_from(models):
    recipe = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
"""
    found = pymerge.explain(recipe)["model.layers.3.mlp.up_proj.weight"]
    (source,) = found.inputs
    assert (source.model, source.tensor) == ("b", "model.layers.2.mlp.up_proj.weight")
    assert (found.kind, found.note) == ("copied", "only one model takes part: copied byte by byte")


def test_groups_hold_equal_settings(models):
    groups = grouped(pymerge.explain(RECIPE).tensors)
    assert sorted(group.names for group in groups) == [
        ["lm_head.weight"],
        ["model.embed_tokens.weight"],
        ["model.layers.{0-4}.mlp.up_proj.weight"],
        ["model.layers.{0-4}.self_attn.q_proj.weight"],
        ["model.positions"],
    ]


@pytest.mark.parametrize(
    ("names", "drawn"),
    [
        (["a.0.w", "a.1.w", "a.3.w"], ["a.{0-1,3}.w"]),
        (["a.0.w", "a.0.v", "a.1.w", "a.1.v"], ["a.{0-1}: w, v"]),
        (["h.2", "x", "y"], ["h.2", "x", "y"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.{0-1}.e.{0-1}.w"]),
        ([], []),
    ],
)
def test_names_are_drawn_together(names, drawn):
    assert drawn_together(names) == drawn


def test_the_command(models, run_pymerge):
    (models / "r.yml").write_text(RECIPE)
    done = run_pymerge("explain", "r.yml", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "0 to 1" in done.stdout
    assert "filter 'self_attn', gradient [0.0, 1.0, 0.5]" in done.stdout
    assert "decides nothing: parameters.lambda.value (line 20)" in done.stdout
    one = run_pymerge("explain", "r.yml", "layers.1.self_attn", "--json", cwd=models)
    (tensor,) = json.loads(one.stdout)["tensors"]
    assert tensor["inputs"][1]["parameters"][0]["position"] == 0.25
    wrong = run_pymerge("explain", "r.yml", "no_such", cwd=models)
    assert wrong.returncode == 2
    assert "no output tensor has 'no_such'" in wrong.stderr


def test_a_model_of_seven_billion_parameters_fits_a_screen(tmp_path, run_pymerge):
    """The names and layers of Llama-2-7B, one element a tensor."""
    modules = [f"self_attn.{each}_proj.weight" for each in "qkvo"]
    modules += [f"mlp.{each}_proj.weight" for each in ("gate", "up", "down")]
    modules += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = [f"model.layers.{layer}.{each}" for layer in range(32) for each in modules]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {each: np.zeros(1, np.float16) for each in names}
        save_file(tensors, tmp_path / name / "model.safetensors")
    lines = [line for line in RECIPE.splitlines() if "nothing.like" not in line]
    (tmp_path / "r.yml").write_text("\n".join(lines).replace("filter: lm_head", "filter: norm"))
    done = run_pymerge("explain", "r.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ties: ")
    assert "291 tensors" in done.stdout
    assert "model.layers.{0-31}: " in done.stdout
    assert done.stdout.count("\n") <= 60
