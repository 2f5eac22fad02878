"""Tensors with a row for each token, and what a configuration says of tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pymerge.checkpoint.config import Config, language_parts
from pymerge.checkpoint.tokenizer import Tokenizer

_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|"
    r"backbone\.embeddings?)\.weight$|^(?:\w+\.)?shared\.weight$"
)
_HEADS = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_layer|vocab_projector|predictions\.decoder|"
    r"lm_head\.decoder|lm_head\.linear)\.(?:weight|bias)$"
    r"|^output\.weight$|(?:^|\.)predictions\.bias$"
)
#: Rows of the embedding that are no tokens of the vocabulary, by the type of the model.
EXTRA_ROWS = {"mllama": 8, "mllama_text_model": 8}
_TOKEN_KEY = re.compile(r"\w+_token_(?:id|ids|index)$")

Shapes = Mapping[str, tuple[int, ...]]


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: the embedding of tokens or the output head."""
    return is_embedding(name) or is_output(name)


def is_embedding(name: str) -> bool:
    return _EMBEDDINGS.search(name) is not None


def is_output(name: str) -> bool:
    """Whether a tensor is the output head or its bias."""
    return _HEADS.search(name) is not None


def vocabulary_rows(shapes: Shapes, config: Mapping[str, Any] | None) -> int | None:
    """Rows of the embedding of tokens, else what the configuration says, else None."""
    rows = [s[0] for name, s in shapes.items() if is_embedding(name) and len(s) == 2]
    rows = rows or [s[0] for name, s in shapes.items() if is_output(name) and s]
    return max(rows) if rows else declared_size(config)


def declared_size(config: Mapping[str, Any] | None) -> int | None:
    """The size of the vocabulary by the configuration."""
    for part in language_parts(config or {}):
        if type(part.get("vocab_size")) is int:
            return int(part["vocab_size"])
    return None


def set_vocabulary_size(config: Config, rows: int) -> None:
    """Make a configuration's size of the vocabulary that of what was written."""
    parts = list(language_parts(config))
    found = [part for part in parts if "vocab_size" in part]
    for part in found or parts[-1:]:
        part["vocab_size"] = rows


def moved_token_ids(
    config: Mapping[str, Any], before: Tokenizer, after: Tokenizer
) -> tuple[Config, tuple[str, ...]]:
    """A configuration whose ids are those of the same tokens in another tokenizer; and the fields
    whose token the other has not.

    For the beginning, the end and the padding of a text the other's own tokens stand in.
    """
    moved = copy.deepcopy(dict(config))
    lost: list[str] = []
    for part in language_parts(moved):
        for key in [key for key in part if _TOKEN_KEY.search(key)]:
            value = part[key]
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(type(number) is int for number in numbers):
                continue
            found = [_moved(key, number, before, after) for number in numbers]
            if None in found:
                lost.append(key)
                continue
            part[key] = found if isinstance(value, list) else found[0]
    return moved, tuple(dict.fromkeys(lost))


def _moved(key: str, number: int, before: Tokenizer, after: Tokenizer) -> int | None:
    text = before.texts.get(number)
    if text is None:  # -1 and the like say that there is none
        return number
    if text not in after.tokens:
        own = after.config.get(re.sub(r"_token_ids?$", "_token", key))
        text = own.get("content") if isinstance(own, dict) else own
    return after.tokens.get(text) if isinstance(text, str) else None


def disagreements(
    shapes: Shapes, config: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> Iterator[str]:
    """Sentences on what does not fit together of a model's tensors, its config.json and the ids of
    its tokenizer."""
    embeddings = {n: s[0] for n, s in shapes.items() if is_embedding(n) and len(s) == 2}
    outputs = {n: s[0] for n, s in shapes.items() if is_output(n) and s}
    size = declared_size(config)
    if size is not None:
        for name, rows in {**embeddings, **outputs}.items():
            if rows not in _fitting(size, config, name in embeddings):
                yield (
                    f"config.json, field vocab_size: expected the {rows} rows of tensor {name!r}, "
                    f"found {size}; transformers cannot load the model: correct the field"
                )
    if tokenizer is None:
        return
    for name, rows in {**embeddings, **outputs}.items():
        beyond = [text for text, number in tokenizer.tokens.items() if number >= rows]
        if beyond:
            yield (
                f"tokenizer: expected ids below the {rows} rows of tensor {name!r}, found "
                f"{_listed(tokenizer, beyond)}; merge with tokenizer_source: base, which gives "
                "every token a row"
            )


def _fitting(size: int, config: Mapping[str, Any] | None, is_embedding: bool) -> Iterable[int]:
    types = [part.get("model_type") for part in language_parts(config or {})]
    extra = max((EXTRA_ROWS.get(str(name), 0) for name in types), default=0)
    return (size, size + extra) if is_embedding else (size,)


def _listed(tokenizer: Tokenizer, texts: list[str]) -> str:
    first = ", ".join(f"{tokenizer.tokens[text]} ({text!r})" for text in texts[:3])
    return first if len(texts) <= 3 else f"{first} and {len(texts) - 3} more"
