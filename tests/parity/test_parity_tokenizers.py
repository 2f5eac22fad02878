"""Recipes with tokenizers through mergekit 0.1.5 and through pymerge in mergekit's numerics.

The vocabularies are the same up to the ids of the tokens that a union appends, which mergekit takes
in the order of a hash table; every token's row must be the same to the bit, whatever its id. Pad
rows are a mean that mergekit sums in its own order: they agree to a few units in the last place.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

import pymerge

DRIVER = Path(__file__).with_name("drive_mergekit_tokenizers.py")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 32
CORPORA = {
    "base": ["an apple and a pear", "the pear is green", "apples are red and green"],
    "sea": ["the sea is blue and green", "a boat on the sea", "waves and a red boat"],
    "code": ["def run(x): return x", "for x in range(3): run(x)", "return None"],
}
ADDED = {
    "base": [AddedToken("<|pad|>", special=True, normalized=False)],
    "sea": [
        AddedToken("<|im_start|>", special=True, normalized=False),
        AddedToken("<|im_end|>", special=True, normalized=False),
    ],
    "code": [
        AddedToken("<|im_end|>", special=True, normalized=False),
        AddedToken("<tool>", special=False, lstrip=True),
    ],
}
TEMPLATES = {
    "base": "{% for m in messages %}{{ m['content'] }} one{% endfor %}",
    "sea": "{% for m in messages %}{{ m['content'] }} two{% endfor %}",
    "code": "{% for m in messages %}{{ m['content'] }} two{% endfor %}",
}

LINEAR = """
merge_method: linear
base_model: {base}
models:
  - {model: {base}, parameters: {weight: 0.25}}
  - {model: {sea}, parameters: {weight: 0.5}}
  - {model: {code}, parameters: {weight: 0.75}}
"""
TASKS = """
merge_method: task_arithmetic
base_model: {base}
models:
  - {model: {sea}, parameters: {weight: 0.5}}
  - {model: {code}, parameters: {weight: 0.7}}
"""
NAMED = """
tokenizer:
  source: union
  tokens:
    <|im_end|>: {source: {code}, force: true}
    <|im_start|>: {source: {kind: model_token, model: {base}, token: "</s>"}}
    <new>: {source: {kind: model_token, model: {sea}, token_id: 3}}
    <zero>: {source: {kind: zero}}
"""
RECIPES = {
    "union": LINEAR + "dtype: float32\ntokenizer_source: union\n",
    "union-bf16": LINEAR + "dtype: bfloat16\ntokenizer_source: union\n",
    "base": LINEAR + "dtype: float32\ntokenizer_source: base\n",
    "model": LINEAR + "dtype: float32\ntokenizer_source: {sea}\n",
    "model-bf16": TASKS + "dtype: bfloat16\ntokenizer_source: {code}\n",
    "tasks-union": TASKS + "dtype: float32\ntokenizer_source: union\n",
    "tokens": LINEAR + "dtype: float32" + NAMED,
    "tokens-tasks": TASKS + "dtype: bfloat16" + NAMED,
    "pad": LINEAR + "dtype: float32\ntokenizer: {source: union, pad_to_multiple_of: 64}\n",
    "without-dtype": LINEAR.replace("{sea}", "{sea-bf16}") + "tokenizer_source: union\n",
    "padded": LINEAR.replace("{sea}", "{padded}") + "dtype: float32\ntokenizer_source: union\n",
    "tied": LINEAR.replace("{base}", "{base-tied}")
    .replace("{sea}", "{sea-tied}")
    .replace("{code}", "{code-tied}")
    + "dtype: float32\ntokenizer_source: union\n",
    "template-auto": LINEAR + "dtype: float32\ntokenizer_source: base\nchat_template: auto\n",
}


def tokenizer_of(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPORA[name], trainer)
    tokenizer.add_tokens(ADDED[name])
    return tokenizer


def write_model(
    folder: Path,
    seed: int,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    extra: int = 0,
    tied: bool = False,
) -> None:
    tokenizer = tokenizer_of(name)
    rows = tokenizer.get_vocab_size() + extra
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(dtype)

    prefix = "model.layers.0."
    tensors = {
        EMBEDDING: numbers(rows, WIDTH),
        "model.norm.weight": numbers(WIDTH),
        prefix + "input_layernorm.weight": numbers(WIDTH),
        prefix + "post_attention_layernorm.weight": numbers(WIDTH),
        prefix + "mlp.down_proj.weight": numbers(WIDTH, 48),
        prefix + "mlp.gate_proj.weight": numbers(48, WIDTH),
        prefix + "mlp.up_proj.weight": numbers(48, WIDTH),
        **{prefix + f"self_attn.{p}_proj.weight": numbers(WIDTH, WIDTH) for p in "qkvo"},
    }
    if not tied:
        tensors[HEAD] = numbers(rows, WIDTH)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATES[name],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for seed, name in enumerate(CORPORA):
        write_model(root / name, seed, name)
        write_model(root / f"{name}-tied", 10 + seed, name, tied=True)
    write_model(root / "sea-bf16", 20, "sea", dtype=torch.bfloat16)
    write_model(root / "padded", 21, "sea", extra=29)
    return root


def filled(recipe: str, root: Path) -> str:
    for path in root.iterdir():
        recipe = recipe.replace(f"{{{path.name}}}", str(path))
    return recipe


@pytest.fixture(scope="module")
def theirs(
    peers_python: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """mergekit's output of every recipe."""
    work = tmp_path_factory.mktemp("mergekit")
    jobs = []
    for name, recipe in RECIPES.items():
        (work / f"{name}.yml").write_text(filled(recipe, folders))
        jobs.append(
            {"recipe": str(work / f"{name}.yml"), "out": str(work / name), "truncate": False}
        )
    (work / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [peers_python, DRIVER, work / "jobs.json"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: work / name for name in RECIPES}


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()[-2000:]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_rows_of_tokens(name, theirs, folders, tmp_path):
    expected, their_config = read(theirs[name])
    vocabulary = json.loads((theirs[name] / "vocabulary.json").read_text())
    recipe = filled(RECIPES[name], folders)
    pymerge.merge(recipe, tmp_path / "out", numerics="mergekit")
    assert pymerge.verify(tmp_path / "out").ok
    found, config = read(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ours = tokenizer.get_vocab()
    assert ours.keys() == vocabulary.keys()
    base = tokenizer_of("base").get_vocab() if "union" in recipe else vocabulary
    assert {token: ours[token] for token in base} == {token: vocabulary[token] for token in base}
    assert config["vocab_size"] == their_config["vocab_size"]
    assert found.keys() == expected.keys()
    order = sorted(vocabulary)
    for tensor in found:
        assert found[tensor].dtype == expected[tensor].dtype
        assert found[tensor].shape == expected[tensor].shape
        if tensor not in (EMBEDDING, HEAD):
            assert torch.equal(found[tensor], expected[tensor])
            continue
        rows = found[tensor][[ours[token] for token in order]]
        their_rows = expected[tensor][[vocabulary[token] for token in order]]
        assert torch.equal(rows, their_rows)
        pads, their_pads = found[tensor][len(ours) :], expected[tensor][len(ours) :]
        torch.testing.assert_close(pads, their_pads, rtol=0, atol=1e-6)
    assert name != "pad" or len(found[EMBEDDING]) > len(ours)


def test_the_commonest_template(theirs, folders, tmp_path):
    recipe = filled(RECIPES["template-auto"], folders)
    pymerge.merge(recipe, tmp_path / "out", numerics="mergekit")
    text = json.loads((theirs["template-auto"] / "template.json").read_text())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text == TEMPLATES["sea"]
