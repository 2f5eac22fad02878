"""The checkpoints that the recipes of recipes.yml name, beside those of the ``llamas`` fixture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from llama_checkpoints import llama_shapes, write_llama
from modular import write_modular
from safetensors.torch import save_file

WORDS = ("<s>", "</s>", "<unk>", "red", "green", "blue", "one", "two", "three", "ship", "sea")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
EXPERTS, EXPERT_WIDTH, MOE_WIDTH, MOE_LAYERS = 4, 24, 16, 2


def write_inputs(root: Path) -> None:
    """Every checkpoint into a folder of its own below ``root``."""
    rng = np.random.default_rng(77)
    for name, words in (
        ("tok-base", ()),
        ("tok-a", ("<|a-only|>", "<|both|>")),
        ("tok-b", ("<|both|>", "<|b-only|>")),
    ):
        write_with_tokenizer(root / name, words, rng)
    write_adapter(root / "adapter", rng, rank=4, modules=("q_proj", "v_proj"))
    write_adapter(root / "adapter-rank2", rng, rank=2, modules=("down_proj",))
    for name in ("base", "a"):
        write_mixtral(root / f"moe-{name}", rng, packed=False)
        write_mixtral(root / f"packed-{name}", rng, packed=True)
    for seed, name in enumerate(("base", "a")):
        write_modular(root / f"vlm-{name}", "gemma3", seed)


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 0.02, shape).astype(np.float32))


def write_with_tokenizer(folder: Path, added: Sequence[str], rng: np.random.Generator) -> None:
    """A Llama whose embedding has a row for each token and no other."""
    rows = len(WORDS) + len(added)
    tensors = {
        name: normal(rng, *((rows, *shape[1:]) if "embed" in name or "lm_head" in name else shape))
        for name, shape in llama_shapes(2, tied=False).items()
    }
    write_llama(folder, tensors, 2, tied=False)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokens = [
        {
            "id": number,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, word in enumerate((*WORDS, *added))
        if word.startswith("<")
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": tokens,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_adapter(
    folder: Path, rng: np.random.Generator, rank: int, modules: Sequence[str]
) -> None:
    """A LoRA adapter of the model ``base`` as PEFT saves it."""
    folder.mkdir()
    tensors = {}
    for name, shape in llama_shapes(4, tied=False).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(modules)):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = normal(rng, rank, shape[1])
            tensors[f"{prefix}.lora_B.weight"] = normal(rng, shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_mixtral(folder: Path, rng: np.random.Generator, packed: bool) -> None:
    """A Mixtral in the names of its makers, or with each layer's experts in two tensors."""
    folder.mkdir()
    width, inner = MOE_WIDTH, EXPERT_WIDTH
    tensors = {
        "model.embed_tokens.weight": normal(rng, 32, width),
        "model.norm.weight": normal(rng, width),
        "lm_head.weight": normal(rng, 32, width),
    }
    for layer in range(MOE_LAYERS):
        prefix = f"model.layers.{layer}."
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{part}.weight"] = normal(rng, width)
        for part in "qkvo":
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = normal(rng, width, width)
        if packed:
            experts = f"{prefix}mlp.experts."
            tensors[f"{prefix}mlp.gate.weight"] = normal(rng, EXPERTS, width)
            tensors[f"{experts}gate_up_proj"] = normal(rng, EXPERTS, 2 * inner, width)
            tensors[f"{experts}down_proj"] = normal(rng, EXPERTS, width, inner)
            continue
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = normal(rng, EXPERTS, width)
        for expert in range(EXPERTS):
            inside = f"{prefix}block_sparse_moe.experts.{expert}."
            tensors[f"{inside}w1.weight"] = normal(rng, inner, width)
            tensors[f"{inside}w2.weight"] = normal(rng, width, inner)
            tensors[f"{inside}w3.weight"] = normal(rng, inner, width)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "num_hidden_layers": MOE_LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def as_packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral's tensors with each layer's experts in two, as mergekit writes them."""
    packed = {
        name.replace(".block_sparse_moe.gate.", ".mlp.gate."): tensor
        for name, tensor in tensors.items()
        if ".block_sparse_moe.experts." not in name
    }
    for layer in range(MOE_LAYERS):
        inside = f"model.layers.{layer}.block_sparse_moe.experts."
        if f"{inside}0.w1.weight" not in tensors:
            continue
        w1, w2, w3 = (
            torch.stack([tensors[f"{inside}{e}.w{i}.weight"] for e in range(EXPERTS)])
            for i in (1, 2, 3)
        )
        packed[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        packed[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return packed
