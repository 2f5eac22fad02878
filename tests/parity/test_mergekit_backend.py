"""Merges that mergekit plans and our engine runs, compared with mergekit's own, file by file.

In float32 an element may differ by the rounding of a few operations, in mergekit's numerics by
nothing. Both runs share a process, so that what depends on Python's hash seed is the same for both.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.methods.numerics import Numerics

DRIVER = Path(__file__).with_name("drive_mergekit_backend.py")
#: Units in the last place of float32 at the largest element of a tensor.
ROUNDING = 8 * 2.0**-24

#: Recipes by name; a name in braces is the folder of a checkpoint.
RECIPES: dict[str, str] = {
    "linear-mixed-dtypes": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.3}}
          - {model: {c-f16}, parameters: {weight: 0.7}}
    """,
    "ties-gradient-and-filter": """
        merge_method: ties
        base_model: {base}
        models:
          - model: {a}
            parameters:
              weight: [{filter: down_proj, value: [0.2, 0.9]}, {value: 0.6}]
              density: [0.3, 0.8, 0.5]
          - {model: {b}, parameters: {weight: 0.3, density: 0.5}}
        parameters: {lambda: 0.9, int8_mask: true}
        dtype: float32
    """,
    "slices": """
        merge_method: passthrough
        slices:
          - sources: [{model: {a}, layer_range: [0, 3]}]
          - sources: [{model: {b}, layer_range: [1, 4], parameters: {scale: 0.5}}]
          - sources: [{model: {deep}, layer_range: [4, 6]}]
        dtype: float32
    """,
    "slices-slerp": """
        merge_method: slerp
        base_model: {base}
        slices:
          - sources:
              - {model: {base}, layer_range: [0, 2]}
              - {model: {a}, layer_range: [2, 4]}
        parameters: {t: [{filter: self_attn, value: [0, 0.5]}, {value: 0.7}]}
        dtype: float32
    """,
    "tied-and-untied": """
        merge_method: linear
        models:
          - {model: {a-tied}, parameters: {weight: 1.0}}
          - {model: {a}, parameters: {weight: 1.0}}
        dtype: float32
    """,
    "tied": """
        merge_method: task_arithmetic
        base_model: {base-tied}
        models: [{model: {a-tied}, parameters: {weight: 0.5}}]
        dtype: float32
    """,
    "out-dtype-shards": """
        merge_method: task_arithmetic
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {b}, parameters: {weight: 0.25}}
        dtype: float32
        out_dtype: bfloat16
    """,
    "union": """
        merge_method: task_arithmetic
        base_model: {tokens-base}
        models:
          - {model: {tokens-a}, parameters: {weight: 0.5}}
          - {model: {tokens-b}, parameters: {weight: 0.25}}
        tokenizer_source: union
        dtype: float32
    """,
    "tokens": """
        merge_method: linear
        models:
          - {model: {tokens-a}, parameters: {weight: 0.5}}
          - {model: {tokens-b}, parameters: {weight: 0.25}}
        base_model: {tokens-base}
        parameters: {weight: 0.25}
        tokenizer:
          source: union
          pad_to_multiple_of: 32
          tokens:
            <x>: {source: {kind: zero}}
            <y>: {source: {tokens-a}, force: true}
            <z>: {source: {kind: model_token, model: {tokens-b}, token: "!"}, force: true}
        dtype: float32
    """,
    "truncated": """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {tokens-b}, parameters: {weight: 0.25}}
        dtype: float32
    """,
    "pickles": """
        merge_method: linear
        models:
          - {model: {a-pickle}, parameters: {weight: 0.5}}
          - {model: {b}, parameters: {weight: 0.25}}
        dtype: float32
    """,
    "experts": """
        merge_method: task_arithmetic
        base_model: {moe-base}
        models: [{model: {moe-a}, parameters: {weight: 0.5}}]
        dtype: float32
    """,
    "in-memory": """
        merge_method: ties
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.5, density: 0.4}}
          - {model: {b}, parameters: {weight: 0.25, density: 0.6}}
        dtype: float32
    """,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "out-dtype-shards": {"out_shard_size": 100_000},
    "truncated": {"unsafe_truncate_embeddings": True},
}
BF16_MODELS = """
        base_model: {base-bf16}
        models:
          - {model: {a-bf16}, parameters: {weight: 0.5, density: 0.4}}
          - {model: {b-bf16}, parameters: {weight: 0.3, density: 0.7}}
        dtype: bfloat16
"""
#: In mergekit's numerics: bit for bit. Ties are left out, which are another's test.
STEPWISE: dict[str, str] = {
    "stepwise-task-arithmetic": f"        merge_method: task_arithmetic{BF16_MODELS}",
    "stepwise-dare": f"        merge_method: dare_linear{BF16_MODELS}",
    "stepwise-slices": """
        merge_method: dare_ties
        base_model: {base-bf16}
        slices:
          - sources:
              - {model: {base-bf16}, layer_range: [2, 4]}
              - {model: {a-bf16}, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.4}}
        dtype: bfloat16
    """,
    "stepwise-union": """
        merge_method: linear
        base_model: {tokens-base}
        models:
          - {model: {tokens-a}, parameters: {weight: 0.5}}
          - {model: {tokens-b}, parameters: {weight: 0.25}}
        parameters: {weight: 0.25}
        tokenizer: {source: union, pad_to_multiple_of: 32}
        dtype: bfloat16
    """,
}
#: Our own methods in mergekit's YAML, without what depends on a solver.
OURS: dict[str, str] = {
    "magmax": """
        merge_method: magmax
        base_model: {base}
        models: [{model: {a}}, {model: {b}}]
        parameters: {lambda: 0.7}
        dtype: float32
    """,
    "pcb": """
        merge_method: pcb
        base_model: {base}
        models:
          - {model: {a}, parameters: {weight: 0.8}}
          - {model: {b}}
        parameters: {ratio: 0.2}
        dtype: float32
    """,
}
#: mergekit's executor, our maths: (recipe, numerics).
METHODS: dict[str, tuple[str, Numerics]] = {
    "methods-slerp": (RECIPES["slices-slerp"], "accurate"),
    "methods-ties": (RECIPES["ties-gradient-and-filter"], "accurate"),
    "methods-passthrough": (RECIPES["slices"], "accurate"),
    "methods-stepwise": (STEPWISE["stepwise-task-arithmetic"], "mergekit"),
    "methods-magmax": (OURS["magmax"], "accurate"),
}
#: What is not ours to merge: (recipe, options, why, how many tensors are left; None for all).
LEFT: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    "left-no-safetensors": (
        RECIPES["tied"],
        {"safe_serialization": False},
        "PyTorch files as output (--no-safe-serialization)",
        None,
    ),
    "left-other-shapes": (
        """
        merge_method: linear
        models:
          - {model: {a}, parameters: {weight: 0.5}}
          - {model: {tokens-b}, parameters: {weight: 0.25}}
        dtype: float32
        """,
        {},
        "inputs of different shapes",
        2,
    ),
    "left-density": (
        """
        merge_method: ties
        base_model: {base}
        models:
          - model: {a}
            parameters: {weight: 0.5, density: [{filter: q_proj, value: 1.5}, {value: 0.5}]}
          - {model: {b}, parameters: {weight: 0.25}}
        dtype: float32
        """,
        {},
        "ties: density is at most 1, found 1.5",
        4,
    ),
}


def write_tokenizer(folder: Path, tokens: str, added: list[str]) -> None:
    """A tokenizer of single characters and added tokens, in this order."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    model = BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(llamas: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: those of ``llamas``, and some with tokenizers of their own."""
    root = tmp_path_factory.mktemp("more")
    found = {path.name: path for path in llamas.iterdir()}

    def copy(name: str, source: str, rows: int = 96) -> Path:
        folder = root / name
        folder.mkdir()
        tensors = load_file(found[source] / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:rows].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((found[source] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        found[name] = folder
        return folder

    letters = "".join(map(chr, range(33, 113)))
    write_tokenizer(copy("tokens-base", "base"), letters, ["<x>"])
    write_tokenizer(copy("tokens-a", "a", 90), letters[::-1], ["<y>", "<x>"])
    write_tokenizer(copy("tokens-b", "b", 88), letters[40:] + letters[:40], ["<z>"])
    folder = copy("a-pickle", "a")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for seed, name in enumerate(("moe-base", "moe-a")):
        found[name] = root / name
        write_experts(root / name, seed)
    return found


def write_experts(folder: Path, seed: int) -> None:
    """A Mixtral with a tensor for each expert, which mergekit packs."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=False,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert any(".experts.3.w2.weight" in name for name in names)


def written(recipe: str, models: dict[str, Path]) -> str:
    for name, folder in models.items():
        recipe = recipe.replace(f"{{{name}}}", str(folder))
    return recipe


@pytest.fixture(scope="module")
def merged(
    peers_python: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every recipe merged both ways, by one process because mergekit takes seconds to start."""
    out = tmp_path_factory.mktemp("merged")
    jobs: list[dict[str, Any]] = [
        {"name": name, "recipe": recipe, "options": OPTIONS.get(name, {})}
        for name, recipe in {**RECIPES, **OURS}.items()
    ]
    jobs += [
        {"name": name, "recipe": recipe, "numerics": numerics, "seam": "methods"}
        for name, (recipe, numerics) in METHODS.items()
    ]
    jobs += [
        {"name": name, "recipe": recipe, "options": options}
        for name, (recipe, options, _, _) in LEFT.items()
    ]
    seeded = {"random_seed": 7}
    jobs += [
        {"name": name, "recipe": recipe, "options": seeded, "numerics": "mergekit"}
        for name, recipe in STEPWISE.items()
    ]
    for job in jobs:
        job["recipe"] = written(job["recipe"], models)
        job["in_memory"] = job["name"] == "in-memory"
    (out / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYMERGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [peers_python, DRIVER, out / "jobs.json", out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()[-3000:]
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    assert found
    return found


def check_tensors(theirs: Path, ours: Path, rounding: float) -> None:
    expected, found = tensors_of(theirs), tensors_of(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        wide, got = tensor.double(), found[name].double()
        scale = float(wide.abs().max())
        units = rounding if tensor.dtype == torch.float32 or not rounding else 2.0**-8
        assert float((wide - got).abs().max()) <= units * scale, name


def check_files(theirs: Path, ours: Path) -> None:
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def lowered(merged: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_float32(name: str, merged: Path) -> None:
    theirs, ours = merged / "plain" / name, merged / "ours" / name
    check_tensors(theirs, ours, ROUNDING)
    check_files(theirs, ours)
    done = lowered(merged, name)
    assert (done["left"], done["whole"]) == ({}, {})
    assert (done["merges"], done["tensors"]) == (1, len(tensors_of(ours)))


@pytest.mark.parametrize("name", STEPWISE)
def test_mergekit_numerics_bit_for_bit(name: str, merged: Path) -> None:
    theirs, ours = merged / "plain" / name, merged / "ours" / name
    check_tensors(theirs, ours, 0.0)
    check_files(theirs, ours)
    assert lowered(merged, name)["merges"] == 1


def test_shards_hold_the_same_tensors(merged: Path) -> None:
    names = {
        side: {
            path.name: set(load_file(path))
            for path in (merged / side / "out-dtype-shards").glob("*.safetensors")
        }
        for side in ("plain", "ours")
    }
    assert len(names["plain"]) > 3
    assert names["ours"] == names["plain"]


@pytest.mark.parametrize("name", OURS)
def test_our_methods_in_their_recipes(
    name: str, merged: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit alone has no such method; our own planner gives the same bytes as its planner."""
    import pymerge

    assert "Unimplemented merge method" in (merged / "plain" / name / "error.txt").read_text()
    found = tensors_of(merged / "ours" / name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(written(OURS[name], models))
    pymerge.merge(recipe, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", METHODS)
def test_maths_alone(name: str, merged: Path) -> None:
    """The same maths whether mergekit's executor runs it or ours, which ran no merge here."""
    _, numerics = METHODS[name]
    ours = merged / "ours" / name
    theirs = merged / ("ours/magmax" if name == "methods-magmax" else f"plain/{name}")
    check_tensors(theirs, ours, 0.0 if numerics == "mergekit" else ROUNDING)
    assert lowered(merged, name)["merges"] == 0


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_ours_is_left_to_mergekit(name: str, merged: Path) -> None:
    """The outcome is mergekit's own, whether files or an error."""
    _, _, reason, count = LEFT[name]
    done = lowered(merged, name)
    theirs, ours = merged / "plain" / name, merged / "ours" / name
    if count is None:
        assert done["whole"] == {reason: 1}
        check_files(theirs, ours)
        return
    assert done["left"] == {reason: count}
    if (theirs / "error.txt").exists():
        last = [(side / "error.txt").read_text().splitlines()[-1] for side in (theirs, ours)]
        assert last[0] == last[1]
        return
    check_tensors(theirs, ours, ROUNDING)
    check_files(theirs, ours)
    assert done["tensors"] == len(tensors_of(ours)) - count


def test_each_seam_leaves_the_other_as_it_is(peers_python: Path) -> None:
    code = """
from mergekit.merge_methods import registry
from pymerge.integrations import mergekit
before = dict(registry._METHODS)
mergekit.install()
installed = dict(registry._METHODS)
mergekit.redirect()
mergekit.restore()
assert registry._METHODS == installed and "pcb" in installed
mergekit.redirect()
mergekit.uninstall()
assert "pcb" in registry._METHODS and registry._METHODS["ties"] is before["ties"]
mergekit.restore()
assert registry._METHODS == before
"""
    subprocess.run([peers_python, "-c", code], check=True, cwd=Path(__file__).parents[2])
