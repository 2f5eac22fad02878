"""Which tensors the output has and where they come from; worked out by hand from the dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge


def write_model(
    folder: Path,
    layers: int,
    *,
    value: float,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, torch.Tensor] | None = None,
    config: dict | None = None,
) -> Path:
    """A model whose layer n is filled with value + n, embedding with value + .25, norm + .5."""
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": torch.full((8, 4), value + 0.25)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.attn.weight"] = torch.full((4, 4), value + layer)
        tensors[f"model.layers.{layer}.norm.weight"] = torch.full((4,), value + layer)
    tensors["model.norm.weight"] = torch.full((4,), value + 0.5)
    if not tied:
        tensors["lm_head.weight"] = torch.full((8, 4), value + 0.75)
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | (extra or {})
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def merged(recipe: dict, out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    pymerge.merge(recipe, out)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def weights(*models: Path) -> list[dict]:
    return [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]


def test_slices_stack_layers_and_rewrite_the_config(tmp_path: Path) -> None:
    kinds = ["full", "sliding", "full", "sliding"]
    a = write_model(tmp_path / "a", 4, value=100, config={"layer_types": kinds})
    b = write_model(tmp_path / "b", 4, value=200, config={"layer_types": kinds})
    tensors, config = merged(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": str(a), "layer_range": [0, 3]}]},
                {"sources": [{"model": str(b), "layer_range": [1, 4]}]},
            ],
        },
        tmp_path / "out",
    )
    values = [tensors[f"model.layers.{n}.attn.weight"][0, 0].item() for n in range(6)]
    assert values == [100, 101, 102, 201, 202, 203]
    assert "model.layers.6.attn.weight" not in tensors
    assert tensors["model.embed_tokens.weight"][0, 0] == 100.25  # of the first slice
    assert tensors["model.norm.weight"][0] == 200.5  # of the last slice
    assert tensors["lm_head.weight"][0, 0] == 200.75
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["full", "sliding", "full", "sliding", "full", "sliding"]


def test_a_slice_without_layers_chooses_embeddings_or_head(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 2, value=100)
    b = write_model(tmp_path / "b", 2, value=200)
    tensors, _ = merged(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": str(b), "layer_range": [0, 0]}]},
                {"sources": [{"model": str(a), "layer_range": [0, 2]}]},
            ],
        },
        tmp_path / "out",
    )
    assert tensors["model.embed_tokens.weight"][0, 0] == 200.25
    assert tensors["model.norm.weight"][0] == 100.5
    assert tensors["model.layers.0.attn.weight"][0, 0] == 100


def test_gradients_run_over_the_layers_of_a_slice(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 4, value=1)
    b = write_model(tmp_path / "b", 4, value=0)
    tensors, _ = merged(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(a), "parameters": {"weight": [1, 2, 4]}},
                {"model": str(b), "parameters": {"weight": 0}},
            ],
            "parameters": {"normalize": False},
        },
        tmp_path / "out",
    )
    for layer, factor in enumerate([1, 5 / 3, 8 / 3, 4]):
        found = tensors[f"model.layers.{layer}.attn.weight"][0, 0].item()
        assert found == pytest.approx(factor * (1 + layer), rel=1e-6)
    assert tensors["model.embed_tokens.weight"][0, 0] == 1.25  # the first value
    assert tensors["lm_head.weight"][0, 0] == 1.75


def test_without_a_base_the_first_model_is_the_donor(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 2, value=1, config={"note": "first"})
    b = write_model(tmp_path / "b", 2, value=3, config={"note": "second"})
    tensors, config = merged({"merge_method": "linear", "models": weights(b, a)}, tmp_path / "out")
    assert config["note"] == "second"
    assert tensors["model.layers.1.attn.weight"][0, 0] == 3


def test_a_head_that_only_one_model_has_is_kept_and_untied(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", 2, value=1, tied=True)
    own = write_model(tmp_path / "own", 2, value=3)
    tensors, config = merged(
        {"merge_method": "linear", "models": weights(tied, own)}, tmp_path / "out"
    )
    # the tied model's head is its embedding: (1.25 + 3.75) / 2
    assert tensors["lm_head.weight"][0, 0] == 2.5
    assert config["tie_word_embeddings"] is False


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 2, value=1, tied=True)
    b = write_model(tmp_path / "b", 2, value=3, tied=True)
    tensors, config = merged({"merge_method": "linear", "models": weights(a, b)}, tmp_path / "out")
    assert "lm_head.weight" not in tensors
    assert config["tie_word_embeddings"] is True


def test_a_head_that_is_stored_and_declared_tied_unties_where_another_differs(
    tmp_path: Path,
) -> None:
    """The tied model's head is its embedding, whatever it stores; the merged head is its own."""
    tied = write_model(tmp_path / "tied", 1, value=1, config={"tie_word_embeddings": True})
    own = write_model(tmp_path / "own", 1, value=3)
    tensors, config = merged(
        {"merge_method": "linear", "models": weights(tied, own)}, tmp_path / "out"
    )
    assert tensors["lm_head.weight"][0, 0] == (1.25 + 3.75) / 2
    assert config["tie_word_embeddings"] is False


def test_a_head_that_is_stored_and_tied_everywhere_stays_tied(tmp_path: Path) -> None:
    flag = {"tie_word_embeddings": True}
    a = write_model(tmp_path / "a", 1, value=1, config=flag)
    b = write_model(tmp_path / "b", 1, value=3, config=flag)
    tensors, config = merged({"merge_method": "linear", "models": weights(a, b)}, tmp_path / "out")
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    assert config["tie_word_embeddings"] is True


def test_a_head_of_any_model_is_enough_with_slices(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", 2, value=1, tied=True)
    own = write_model(tmp_path / "own", 2, value=3)
    tensors, config = merged(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": str(own), "layer_range": [0, 1]}]},
                {"sources": [{"model": str(tied), "layer_range": [1, 2]}]},
            ],
        },
        tmp_path / "out",
    )
    assert tensors["model.embed_tokens.weight"][0, 0] == 3.25
    assert tensors["lm_head.weight"][0, 0] == 1.25  # the last slice's model ties its embedding
    assert config["tie_word_embeddings"] is False


def test_an_output_head_called_embedding_stands_after_the_layers(tmp_path: Path) -> None:
    """GPT-NeoX calls it embed_out; with slices it is of the last one."""
    folders = []
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        tensors = {"gpt_neox.embed_in.weight": torch.full((8, 4), value)}
        for layer in range(2):
            tensors[f"gpt_neox.layers.{layer}.w"] = torch.full((4,), value + layer)
        tensors["embed_out.weight"] = torch.full((8, 4), value + 0.75)
        save_file(tensors, tmp_path / name / "model.safetensors")
        folders.append(tmp_path / name)
    pymerge.merge(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": str(folder), "layer_range": [0, 1]}]} for folder in folders
            ],
        },
        tmp_path / "out",
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["gpt_neox.embed_in.weight"][0, 0] == 1
    assert tensors["embed_out.weight"][0, 0] == 3.75


def test_slices_name_the_tensors_that_only_other_models_have(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 2, value=1)
    extra = {"mtp.head": torch.ones(2), "model.layers.1.extra": torch.ones(2)}
    b = write_model(tmp_path / "b", 2, value=3, extra=extra)
    slices = [
        {
            "sources": [
                {"model": str(m), "layer_range": [0, 2], "parameters": {"weight": 1}}
                for m in (a, b)
            ]
        }
    ]
    planned = pymerge.plan({"merge_method": "linear", "slices": slices})
    assert set(planned.dropped) == {f"{b}: mtp.head", f"{b}: model.layers.1.extra"}


def test_floating_and_other_types_are_not_mixed(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1, extra={"x": torch.ones(3)})
    b = write_model(tmp_path / "b", 1, value=3, extra={"x": torch.ones(3, dtype=torch.int32)})
    for pair in ((a, b), (b, a)):
        with pytest.raises(pymerge.PlanError, match=r"'x'.*floating and other types"):
            pymerge.plan({"merge_method": "linear", "models": weights(*pair)})


def test_parameters_that_cannot_work_are_found_by_the_plan(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3)
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((a, 1.0), (b, -1.0))]
    with pytest.raises(pymerge.RecipeError, match="sum to zero"):
        pymerge.plan({"merge_method": "linear", "models": models})


def test_every_tensor_of_the_donor_is_written_in_its_order(tmp_path: Path) -> None:
    extra = {
        "model.vision.proj": torch.full((3, 3), 7.0),
        "model.position_ids": torch.arange(5),
        "model.mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.0),
    }
    a = write_model(tmp_path / "a", 2, value=1, extra=extra)
    b = write_model(tmp_path / "b", 2, value=3, extra=extra)
    recipe = {"merge_method": "linear", "models": weights(a, b), "dtype": "bfloat16"}
    tensors, config = merged(recipe, tmp_path / "out")
    planned = pymerge.plan(recipe)
    assert [job.name for job in planned.jobs] == list(planned.donor.tensors)
    assert set(tensors) == set(planned.donor.tensors)
    assert tensors["model.position_ids"].equal(torch.arange(5))
    assert tensors["model.mask"].tolist() == [True, False]
    assert tensors["scalar"].item() == 2.0
    assert tensors["scalar"].dtype == torch.bfloat16
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("first", "second", "dtype", "out_dtype", "expected"),
    [
        ("bfloat16", "bfloat16", None, None, "bfloat16"),
        ("bfloat16", "float16", None, None, "float32"),
        ("bfloat16", "float32", None, None, "float32"),
        ("float64", "float32", None, None, "float64"),
        ("float32", "float32", "bfloat16", None, "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "float16", "float16"),
        ("float8_e4m3fn", "bfloat16", None, None, "bfloat16"),
    ],
)
def test_output_format(tmp_path: Path, first, second, dtype, out_dtype, expected) -> None:
    a = write_model(tmp_path / "a", 1, value=1, dtype=getattr(torch, first))
    b = write_model(tmp_path / "b", 1, value=3, dtype=getattr(torch, second))
    recipe = {"merge_method": "linear", "models": weights(a, b)}
    recipe |= {"dtype": dtype} if dtype else {}
    recipe |= {"out_dtype": out_dtype} if out_dtype else {}
    tensors, config = merged(recipe, tmp_path / "out")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{expected}"}
    assert config["torch_dtype"] == expected


def test_formats_that_are_only_read_need_an_output_type(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1, dtype=torch.float8_e4m3fn)
    b = write_model(tmp_path / "b", 1, value=3, dtype=torch.float8_e4m3fn)
    with pytest.raises(pymerge.PlanError, match="dtype: bfloat16"):
        pymerge.plan({"merge_method": "linear", "models": weights(a, b)})


def test_a_missing_tensor_is_an_error_unless_allowed(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1, extra={"model.adapter": torch.full((2,), 4.0)})
    b = write_model(tmp_path / "b", 1, value=3)
    recipe = {"merge_method": "linear", "models": weights(a, b)}
    with pytest.raises(pymerge.PlanError, match=r"model\.adapter.*--allow-missing"):
        pymerge.merge(recipe, tmp_path / "out")
    report = pymerge.merge(recipe, tmp_path / "out", allow_missing=True)
    assert any("model.adapter" in warning for warning in report.warnings)
    assert load_file(tmp_path / "out/model.safetensors")["model.adapter"].tolist() == [4.0, 4.0]


def test_tensors_that_only_other_models_have_are_named(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3, extra={"mtp.head": torch.ones(2)})
    planned = pymerge.plan({"merge_method": "linear", "models": weights(a, b)})
    assert planned.dropped == (f"{b}: mtp.head",)
    assert any("mtp.head" in warning for warning in planned.warnings)


def test_shapes_must_agree(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3)
    tensors = load_file(b / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.ones(9, 4)
    save_file(tensors, b / "model.safetensors")
    with pytest.raises(pymerge.PlanError, match=r"\[9, 4\].*expected \[8, 4\].*tokenizers"):
        pymerge.plan({"merge_method": "linear", "models": weights(a, b)})


def test_a_filter_that_matches_nothing_but_resembles_a_name_is_an_error(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    recipe = {
        "merge_method": "linear",
        "models": [
            {
                "model": str(a),
                "parameters": {"weight": [{"filter": "atn", "value": 1}, {"value": 0.5}]},
            }
        ],
    }
    with pytest.raises(pymerge.PlanError, match="did you mean 'attn'"):
        pymerge.plan(recipe)


def test_number_of_models_is_checked(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3)
    models = [{"model": str(m)} for m in (a, b)]
    with pytest.raises(pymerge.PymergeError, match="passthrough takes exactly 1 model"):
        pymerge.plan({"merge_method": "passthrough", "models": models})


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    with pytest.raises(pymerge.PlanError, match="at least 128 MiB"):
        pymerge.plan({"merge_method": "passthrough", "models": [{"model": str(a)}]}, memory="64MiB")


def test_what_a_method_cannot_do_is_said_by_the_plan(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3)
    recipe = {"merge_method": "della", "base_model": str(a), "models": weights(b)}
    pymerge.plan(recipe | {"parameters": {"density": 0.5}})
    with pytest.raises(pymerge.RecipeError, match="strictly between 0 and 1"):
        pymerge.plan(recipe | {"parameters": {"density": 0.1}})


def test_a_donor_without_config_and_a_tokenizer_source_without_tokenizer_are_told(
    tmp_path: Path,
) -> None:
    a = write_model(tmp_path / "a", 1, value=1)
    b = write_model(tmp_path / "b", 1, value=3)
    (a / "config.json").unlink()
    recipe = {"merge_method": "linear", "models": weights(a, b)}
    assert any("no config.json" in warning for warning in pymerge.plan(recipe).warnings)
    with pytest.raises(pymerge.PlanError, match="has no tokenizer files"):
        pymerge.plan(recipe | {"tokenizer_source": str(b)})


def test_a_model_that_does_not_exist_is_named_with_its_place_and_the_nearest(
    tmp_path: Path,
) -> None:
    write_model(tmp_path / "expert", 1, value=1)
    models = [{"model": str(tmp_path / "exprt"), "parameters": {"weight": 1}}]
    with pytest.raises(pymerge.CheckpointError, match=r"models\[0\].*did you mean .*expert"):
        pymerge.plan({"merge_method": "linear", "models": models})
