"""Small models with tokenizers of their own, and what their merge must be, token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

WIDTH = 24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CORPUS = {
    "fruit": ["an apple and a pear", "the pear is green", "apples are red and green"],
    "sea": ["the sea is blue and green", "a boat on the sea", "waves and a red boat"],
    "code": ["def run(x): return x", "for x in range(3): run(x)", "return None"],
}


def bpe(corpus: str, specials: Sequence[str] = ("<s>", "</s>"), size: int = 90) -> Tokenizer:
    """A byte-level BPE tokenizer trained on one of the corpora."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=size, special_tokens=list(specials), show_progress=False)
    tokenizer.train_from_iterator(CORPUS[corpus], trainer)
    return tokenizer


def word_piece(corpus: str, size: int = 60) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[corpus], trainer)
    return tokenizer


def added(tokenizer: Tokenizer, *texts: str, special: bool = True) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    return tokenizer


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    return dict(tokenizer.get_vocab(with_added_tokens=True))


@dataclass(frozen=True)
class Model:
    """A model folder with its tensors and its tokenizer."""

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    tokenizer: Tokenizer

    @property
    def tokens(self) -> dict[str, int]:
        return tokens_of(self.tokenizer)

    def row(self, tensor: str, token: str) -> torch.Tensor | None:
        number = self.tokens.get(token)
        rows = self.tensors[tensor]
        return rows[number] if number is not None and number < len(rows) else None


def make_model(
    folder: Path,
    seed: int,
    tokenizer: Tokenizer,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Model:
    """A Llama of no layers but one norm; ``rows`` beyond the tokenizer's are padding."""
    rows = tokenizer.get_vocab_size() if rows is None else rows
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(dtype)

    tensors = {EMBEDDING: numbers(rows, WIDTH), "model.norm.weight": numbers(WIDTH)}
    if not tied:
        tensors[HEAD] = numbers(rows, WIDTH)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 0,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        **(config or {}),
    }
    if written["num_hidden_layers"] == 0:
        del written["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up": False}
    if tokenizer.token_to_id("<s>") is not None:
        tokenizer_config |= {"bos_token": "<s>", "eos_token": "</s>"}
    for name, content in {"tokenizer_config.json": tokenizer_config, **(files or {})}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return Model(folder, tensors, tokenizer)


def output_of(folder: Path) -> tuple[dict[str, torch.Tensor], Tokenizer, dict[str, Any]]:
    """Tensors, tokenizer and configuration of a merge's output."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tensors, tokenizer, json.loads((folder / "config.json").read_text())


def default_row(
    present: Sequence[Model], base: Model | None, tensor: str, token: str
) -> torch.Tensor:
    """The row of a model that lacks the token, by mergekit's rules in float64."""
    have = [model for model in present if model.row(tensor, token) is not None]
    rows = [model.row(tensor, token) for model in have]
    if len(have) == 1:
        return rows[0].double()
    if base in have:
        return base.row(tensor, token).double()
    if have:
        return torch.stack([row.double() for row in rows]).mean(0)
    return torch.zeros(present[0].tensors[tensor].shape[1:], dtype=torch.float64)


def expected_row(
    present: Sequence[Model],
    weights: Sequence[float],
    base: Model | None,
    tensor: str,
    token: str,
) -> torch.Tensor:
    """The row of a linear merge, [width] float64: each model's own row where it has one."""
    total = torch.zeros(present[0].tensors[tensor].shape[1:], dtype=torch.float64)
    for model, weight in zip(present, weights, strict=True):
        own = model.row(tensor, token)
        row = default_row(present, base, tensor, token) if own is None else own.double()
        total += weight / sum(weights) * row
    return total
