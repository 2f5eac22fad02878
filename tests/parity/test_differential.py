"""Sixty recipes through mergekit 0.1.5, and in its numerics through pymerge-yaml and `pymerge run`.

Weights are equal to the bit outside sort ties; configuration, index, tokenizer and card say the
same up to the differences that docs/differences.md lists. Each of these is undone or left out here
by name, so that any other one fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from differential_inputs import as_packed, write_inputs
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from pymerge.commands.mergekit_yaml import merge
from pymerge.errors import PymergeError

HERE = Path(__file__).parent
RECIPES = {r["name"]: r for r in yaml.safe_load_all((HERE / "recipes.yml").read_text())}
SEED = 11
SHARD = 100_000
#: What runs in mergekit's environment: mergekit, and its command on our engine.
SIDES: dict[str, dict[str, str]] = {"theirs": {}, "run": {"numerics": "mergekit"}}
#: Tokenizers that are no model.
KINDS, TOKENIZER_KEYS = ("base", "union"), ("tokenizer_source", "source")

#: mergekit writes experts packed; ours stay as they came.
REPACKED = ("moe",)
#: B·A is a product of matrices: its sums are in the order of the BLAS, and ours of the rank.
PRODUCTS = ("lora", "lora-task-vectors")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
#: Fields of config.json that differ on purpose, and why.
FIELDS = {
    "dtype-unset-mixed-halves": {"dtype"},  # mergekit keeps the donor's, whatever is written
    "dtype-unset-bf16-f32": {"dtype"},
    "tied-and-untied": {"tie_word_embeddings"},  # a head is written; mergekit still says tied
}
#: mergekit's own config.json cannot be loaded: a dtype of "torch.bfloat16", and lists of layers of
#: another length than the number of layers.
UNREADABLE = ("torch-prefix", "vlm-modules")


@dataclass(frozen=True)
class Done:
    """The output folders of both, and what either said where it failed."""

    theirs: Path
    ours: Path
    run: Path
    errors: tuple[str, ...]


@pytest.fixture(scope="module")
def done(
    peers_python: Path, llamas: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Done]:
    work = tmp_path_factory.mktemp("differential")
    (work / "in").mkdir()
    for folder in llamas.iterdir():
        (work / "in" / folder.name).symlink_to(folder)
    write_inputs(work / "in")
    (work / "recipes").mkdir()
    jobs, found = [], {}
    for name, recipe in RECIPES.items():
        document = placed({key: value for key, value in recipe.items() if key != "name"})
        text = yaml.safe_dump(document, sort_keys=False)
        (work / "recipes" / f"{name}.yml").write_text(text)
        options = ["--quiet", "--random-seed", str(SEED), "--out-shard-size", str(SHARD)]
        options += ["--lora-merge-cache", "adapters", "--allow-crimes"]
        for side in SIDES:
            arguments = [f"recipes/{name}.yml", f"{side}/{name}", *options]
            job = {"command": "mergekit-yaml", "arguments": arguments}
            jobs.append({**job, **SIDES[side], "error": f"{side}-{name}.error"})
    jobs.sort(key=lambda job: "numerics" in job)
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    driver = HERE / "drive_mergekit_commands.py"
    command = [peers_python, driver, "jobs.json"]
    subprocess.run(command, check=True, env=environment, cwd=work, timeout=900, capture_output=True)
    before = Path.cwd()
    os.chdir(work)
    try:
        for name in RECIPES:
            files = [work / f"{side}-{name}.error" for side in SIDES]
            errors = [file.read_text() for file in files if file.exists()]
            try:
                merge_with_pymerge(name)
            except PymergeError as error:
                errors.append(str(error))
            folders = [work / side / name for side in ("theirs", "ours", "run")]
            found[name] = Done(*folders, tuple(errors))
    finally:
        os.chdir(before)
    return found


def placed(value: Any, key: str = "") -> Any:
    """The recipe with ``./in/`` before its models: mergekit takes a relative path with fewer
    slashes for a model of the hub."""
    if isinstance(value, dict):
        return {key: placed(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [placed(inner, key) for inner in value]
    if key in ("model", "base_model", "tokenizer_source", "source") and not (
        value in KINDS and key in TOKENIZER_KEYS
    ):
        return "+".join(f"./in/{part}" for part in value.split("+"))
    return value


def merge_with_pymerge(name: str) -> None:
    """``pymerge-yaml recipes/NAME.yml ours/NAME`` in this process."""
    merge(
        config_file=Path(f"recipes/{name}.yml"),
        out_path=Path(f"ours/{name}"),
        random_seed=SEED,
        out_shard_size=str(SHARD),
        numerics="mergekit",
        quiet=True,
        allow_crimes=True,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    carriers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(carriers[tensor.element_size()])


def test_there_are_sixty_recipes() -> None:
    assert len(RECIPES) == 60


@pytest.mark.parametrize("way", ["ours", "run"])
@pytest.mark.parametrize("name", RECIPES)
def test_weights(done: dict[str, Done], name: str, way: str) -> None:
    each = done[name]
    assert not each.errors
    theirs, ours = weights(each.theirs), weights(getattr(each, way))
    if name in REPACKED and way == "ours":
        ours = as_packed(ours)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].shape == expected.shape, tensor
        assert ours[tensor].dtype == expected.dtype, tensor
        if name in PRODUCTS and way == "ours":
            torch.testing.assert_close(ours[tensor], expected, rtol=3e-7, atol=3e-9)
            continue
        wrong = bits(ours[tensor]) != bits(expected)
        if name == "tokenizer-tokens" and tensor in VOCABULARY:
            # Padding is the mean of all rows, whose sum over rows has torch's order there.
            real = len(AutoTokenizer.from_pretrained(each.ours))
            torch.testing.assert_close(ours[tensor][real:], expected[real:], rtol=1e-6, atol=1e-9)
            wrong[real:] = False
        if name == "ties-bf16":
            wrong &= ~at_a_threshold(tensor, each)
        assert not wrong.any(), f"{tensor}: {int(wrong.sum())} of {wrong.numel()} elements"


def at_a_threshold(tensor: str, each: Done) -> torch.Tensor:
    """Elements of the recipe ties-bf16 whose magnitude is that of the last one kept, in a model
    that drops others of this magnitude: which of these stay a sort leaves open."""
    inputs = each.ours.parents[1] / "in"
    base, *models = (weights(inputs / f"{name}-bf16")[tensor] for name in ("base", "a", "b"))
    found = torch.zeros(base.shape, dtype=torch.bool)
    for model in models:
        size = (model - base).abs()
        kept = max(1, int(0.5 * size.numel()))
        ordered = size.flatten().sort(descending=True).values
        if ordered[kept - 1] == ordered[kept]:
            found |= size == ordered[kept]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_configuration(done: dict[str, Done], name: str) -> None:
    """Both configurations mean the same to transformers, which fills in its defaults."""
    ours = as_dict(done[name].ours)
    if name in UNREADABLE:
        with pytest.raises((AttributeError, StrictDataclassError)):
            as_dict(done[name].theirs)
        return
    theirs = as_dict(done[name].theirs)
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing == FIELDS.get(name, set())


def as_dict(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in found.items() if k not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("name", RECIPES)
def test_files_that_mergekit_writes_around_us(done: dict[str, Done], name: str) -> None:
    """Under ``pymerge run`` all but the weights is mergekit's own work."""
    each = done[name]
    files = {path.name for path in each.theirs.iterdir() if path.suffix != ".safetensors"}
    assert {p.name for p in each.run.iterdir() if p.suffix != ".safetensors"} == files
    for file in files - {"README.md"}:  # the card names its own folder
        assert (each.run / file).read_bytes() == (each.theirs / file).read_bytes(), file


@pytest.mark.parametrize("name", RECIPES)
def test_index(done: dict[str, Done], name: str) -> None:
    """The same names, all in files that exist, and the same total size."""
    each = done[name]
    theirs, ours = (index_of(folder) for folder in (each.theirs, each.ours))
    if theirs is None or ours is None:
        assert theirs is None
        assert ours is None
        return
    if name not in REPACKED:
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for file in set(ours["weight_map"].values()):
        assert (each.ours / file).is_file()


def index_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "model.safetensors.index.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("name", RECIPES)
def test_tokenizer(done: dict[str, Done], name: str) -> None:
    """The same ids for the same tokens, and the same template."""
    each = done[name]
    if not (each.ours / "tokenizer.json").exists():
        # Nor has any input; mergekit lets transformers make one of nothing for some models.
        assert "tok-" not in str(RECIPES[name])
        return
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (each.theirs, each.ours))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert ours.all_special_tokens == theirs.all_special_tokens
    text = "red sea <|a-only|> one <|both|> ship <|b-only|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", RECIPES)
def test_card(done: dict[str, Done], name: str) -> None:
    """The recipe verbatim beside it, and the same claims before the text."""
    each = done[name]
    recipes = [(folder / "mergekit_config.yml").read_text() for folder in (each.theirs, each.ours)]
    assert recipes[0] == recipes[1]
    theirs, ours = (front_matter(folder / "README.md") for folder in (each.theirs, each.ours))
    assert ours["library_name"] == theirs["library_name"]
    assert "merge" in ours["tags"]
    assert ours.get("base_model") == (theirs.get("base_model") or None)
    assert recipes[0].strip() in (each.ours / "README.md").read_text()


def front_matter(card: Path) -> dict[str, Any]:
    found = yaml.safe_load(card.read_text().split("---")[1])
    assert isinstance(found, dict)
    return found
