"""Small models of several parts, named as their makers and mergekit's definitions name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH = 4


def both(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def weights(*names: str) -> list[str]:
    return [f"{name}.weight" for name in names]


def t5_names() -> list[str]:
    names = ["shared.weight"]
    for part, layers in (("encoder", 3), ("decoder", 2)):
        names += weights(f"{part}.final_layer_norm")
        for layer in range(layers):
            inside = [f"layer.0.SelfAttention.{x}" for x in "qkvo"] + ["layer.0.layer_norm"]
            if layer == 0:
                inside.append("layer.0.SelfAttention.relative_attention_bias")
            if part == "decoder":
                inside += [f"layer.1.EncDecAttention.{x}" for x in "qkvo"] + ["layer.1.layer_norm"]
            last = 2 if part == "decoder" else 1
            inside += [f"layer.{last}.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")]
            inside.append(f"layer.{last}.layer_norm")
            names += weights(*(f"{part}.block.{layer}.{name}" for name in inside))
    return names


def text_names(prefix: str, layers: int, *, more: tuple[str, ...], biases: bool) -> list[str]:
    names = weights(f"{prefix}embed_tokens", f"{prefix}norm")
    for layer in range(layers):
        inside = ["input_layernorm", "post_attention_layernorm", *more]
        inside += [f"mlp.{x}_proj" for x in ("down", "gate", "up")]
        inside += [f"self_attn.{x}_proj" for x in "qkvo"]
        names += weights(*(f"{prefix}layers.{layer}.{name}" for name in inside))
        if biases:
            names += [f"{prefix}layers.{layer}.self_attn.{x}_proj.bias" for x in "qkv"]
    return names


def gemma3_names() -> list[str]:
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    more += ("self_attn.q_norm", "self_attn.k_norm")
    names = text_names("language_model.model.", 4, more=more, biases=False)
    names += ["multi_modal_projector.mm_input_projection_weight"]
    names += ["multi_modal_projector.mm_soft_emb_norm.weight"]
    tower = "vision_tower.vision_model."
    names += both(tower + "embeddings.patch_embedding", tower + "post_layernorm")
    names += [tower + "embeddings.position_embedding.weight"]
    for layer in range(3):
        inside = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
        inside += [f"self_attn.{x}_proj" for x in ("k", "q", "v", "out")]
        names += both(*(f"{tower}encoder.layers.{layer}.{name}" for name in inside))
    return names


def qwen2_5_vl_names() -> list[str]:
    names = [*text_names("model.", 3, more=(), biases=True), "lm_head.weight"]
    names += ["visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"]
    for layer in range(2):
        block = f"visual.blocks.{layer}."
        inside = ["attn.qkv", "attn.proj", *(f"mlp.{x}_proj" for x in ("down", "gate", "up"))]
        names += both(*(block + name for name in inside))
        names += weights(block + "norm1", block + "norm2")
    return names + both("visual.merger.mlp.0", "visual.merger.mlp.2")


CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "d_model": WIDTH,
        "vocab_size": WIDTH,
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 4, "vocab_size": WIDTH},
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 3},
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "vocab_size": WIDTH,
        "vision_config": {"model_type": "qwen2_5_vl", "depth": 2},
    },
}
NAMES = {"t5": t5_names, "gemma3": gemma3_names, "qwen2_5_vl": qwen2_5_vl_names}


def write_modular(folder: Path, kind: str, seed: int) -> None:
    """A checkpoint of ``kind`` with random float32 tensors of [WIDTH, WIDTH]."""
    random = np.random.default_rng(seed)
    tensors = {
        name: random.standard_normal((WIDTH, WIDTH), np.float32) for name in sorted(NAMES[kind]())
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], "dtype": "float32"}))
