"""Synthetic Llama-shaped checkpoints in bfloat16, of any size, fast and always the same bytes.

    python bench/models.py DIR --gb 1 --models 3        DIR/base, DIR/tuned-1, ..., DIR/tuned-3
    python bench/models.py DIR --llama-7b --models 1    the shapes of Llama 7B, 13.5 GB each

Weights of the base are normal with deviation 0.02 (norm weights 1 + 0.05 N). A fine-tuned model is
the base plus normal noise whose deviation is between 1e-4 and 1e-3, one per tensor, rounded to
bfloat16: as in real fine-tunes, part of the noise vanishes in rounding and many magnitudes are
equal.

The normals come from one pool of 2^24 numbers; each chunk of a tensor takes a slice of it at an
offset drawn from a generator that is seeded by tensor and model. So generation runs at the speed of
a multiply and a rounding, the distribution is that of the pool, and repetitions are far apart.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

POOL = 1 << 24
CHUNK = 1 << 18  # elements: input, output and scratch of one chunk stay in the L2 cache
VOCABULARY = 32000
ELEMENT_BYTES = 2
HIDDEN_SIZES = (256, 512, 1024, 1536, 2048, 3072, 4096, 5120, 8192)
MIN_LAYERS = 8
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; heads are 128 wide (64 below a width of 1024)."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = VOCABULARY

    @property
    def layer_elements(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def num_elements(self) -> int:
        outside = 2 * self.vocabulary * self.hidden + self.hidden
        return outside + self.layers * self.layer_elements

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the model."""
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        square, row = (self.hidden, self.hidden), (self.hidden,)
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{prefix}.self_attn.{name}.weight", square
            yield f"{prefix}.mlp.gate_proj.weight", wide
            yield f"{prefix}.mlp.up_proj.weight", wide
            yield f"{prefix}.mlp.down_proj.weight", narrow
            yield f"{prefix}.input_layernorm.weight", row
            yield f"{prefix}.post_attention_layernorm.weight", row
        yield "model.norm.weight", row
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """config.json of the checkpoint."""
        head_dim = 128 if self.hidden >= 1024 else 64
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // head_dim,
            "num_key_value_heads": self.hidden // head_dim,
            "head_dim": head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }


LLAMA_7B = Shape(hidden=4096, intermediate=11008, layers=32)


def shape_of_size(gigabytes: float) -> Shape:
    """The Llama nearest to ``gigabytes`` (1e9 bytes): as wide as leaves `MIN_LAYERS` layers or
    more."""
    target = gigabytes * 1e9 / ELEMENT_BYTES
    candidates = []
    for hidden in HIDDEN_SIZES:
        empty = Shape(hidden, 256 * round(hidden * 8 / 3 / 256), 0)
        layers = round((target - empty.num_elements) / empty.layer_elements)
        candidates.append(replace(empty, layers=max(1, layers)))
    deep = [shape for shape in candidates if shape.layers >= MIN_LAYERS]
    return deep[-1] if deep else candidates[0]


class Normals:
    """Slices of one pool of standard normal float32."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = np.random.Generator(np.random.SFC64([seed, 0]))
        self.pool = generator.standard_normal(POOL, dtype=np.float32)

    def chunks(self, count: int, *key: int) -> Iterator[NDArray[np.float32]]:
        """``count`` normals in pieces of at most `CHUNK`; the same key gives the same numbers."""
        generator = np.random.Generator(np.random.SFC64([self.seed, 1, *key]))
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            offset = int(generator.integers(0, POOL - size))
            yield self.pool[offset : offset + size]


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of ``values`` (finite) rounded to bfloat16, nearest even."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    rounded: NDArray[np.uint16] = odd.astype(np.uint16)
    return rounded


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def tensor_chunks(
    normals: Normals, number: int, shape: tuple[int, ...], model: int
) -> Iterator[NDArray[np.uint16]]:
    """Tensor ``number`` of model ``model`` (0: the base) as bfloat16 bit patterns, piece by
    piece."""
    count = math.prod(shape)
    centre, deviation = (1.0, 0.05) if len(shape) == 1 else (0.0, 0.02)
    chooser = np.random.Generator(np.random.SFC64([normals.seed, 2, number, model]))
    noise = np.float32(10 ** chooser.uniform(-4, -3))
    base = normals.chunks(count, number, 0)
    tuning = normals.chunks(count, number, model)
    for drawn, moved in zip(base, tuning, strict=True):
        values = drawn * np.float32(deviation)
        values += np.float32(centre)
        bits = to_bfloat16(values)
        if model:
            values = from_bfloat16(bits)
            values += moved * noise
            bits = to_bfloat16(values)
        yield bits


def shards(shape: Shape, max_bytes: int) -> list[dict[str, tuple[int, tuple[int, ...]]]]:
    """Name -> (number, shape) of the tensors of each shard file."""
    files: list[dict[str, tuple[int, tuple[int, ...]]]] = [{}]
    filled = 0
    for number, (name, dimensions) in enumerate(shape.tensors()):
        num_bytes = math.prod(dimensions) * ELEMENT_BYTES
        if files[-1] and filled + num_bytes > max_bytes:
            files.append({})
            filled = 0
        files[-1][name] = (number, dimensions)
        filled += num_bytes
    return files


def header(tensors: dict[str, tuple[int, tuple[int, ...]]]) -> bytes:
    """Length bytes and JSON of a safetensors file with these tensors in this order."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, dimensions) in tensors.items():
        end = offset + math.prod(dimensions) * ELEMENT_BYTES
        fields[name] = {
            "dtype": "BF16",
            "shape": list(dimensions),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_model(folder: Path, shape: Shape, model: int, normals: Normals) -> None:
    """One checkpoint folder: config.json, two or more shards, their index."""
    folder.mkdir(parents=True, exist_ok=True)
    total = shape.num_elements * ELEMENT_BYTES
    files = shards(shape, min(MAX_SHARD_BYTES, total // 2))
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with (folder / file_name).open("wb", buffering=0) as file:
            file.write(header(tensors))
            for index, dimensions in tensors.values():
                for chunk in tensor_chunks(normals, index, dimensions, model):
                    file.write(chunk.data)
        weight_map.update(dict.fromkeys(tensors, file_name))
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic Llama-shaped checkpoints.")
    parser.add_argument("directory", type=Path)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gb", type=float, help="size of one checkpoint in 1e9 bytes")
    size.add_argument("--llama-7b", action="store_true", help="the exact shapes of Llama 7B")
    parser.add_argument("--models", type=int, default=3, help="fine-tuned models beside the base")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = LLAMA_7B if arguments.llama_7b else shape_of_size(arguments.gb)
    normals = Normals(arguments.seed)
    for model in range(arguments.models + 1):
        name = f"tuned-{model}" if model else "base"
        write_model(arguments.directory / name, shape, model, normals)


if __name__ == "__main__":
    main()
