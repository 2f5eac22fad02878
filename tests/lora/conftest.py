"""Small models with known changes, written as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INNER, WORDS = 24, 40, 50

Tensors = dict[str, torch.Tensor]


def llama_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(2):
        start = f"model.layers.{layer}."
        shapes |= {
            start + "input_layernorm.weight": (HIDDEN,),
            start + "mlp.down_proj.weight": (HIDDEN, INNER),
            start + "mlp.up_proj.weight": (INNER, HIDDEN),
            start + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            start + "self_attn.q_proj.bias": (HIDDEN,),
        }
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.normal(0, 0.05, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    """A change of this rank, its singular values 1, 1/2, 1/4, ... times 1/8."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], rank)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], rank)))
    return torch.from_numpy(((u * 0.5 ** (3 + np.arange(rank))) @ v.T).astype(np.float32))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model's folder."""

    def write(name: str, tensors: Tensors, **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        fields = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "tie_word_embeddings": False,
            **config,
        }
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return write
