"""Which tensors belong to which layer, told by the ``.N.`` in their names.

A layer stack is the prefix before the first number of tensor names that are numbered from 0 without
a gap. That of a whole checkpoint is the one with as many layers as config.json says, or the largest
one. All other tensors stand before the layers (embeddings) or after them (final norm, head).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint, TensorEntry, is_head, is_transposed_pack, layer_count

_NUMBERED = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?P<index>\d+)\.(?P<rest>.+)$")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_BEFORE_LAYERS = re.compile(
    r"embed|wte|wpe|position|token_type|patch|^shared\.|(^|[._])(ln_pre|layernorm_pre|pre_layernorm"
    r"|pre_layrnorm|conv[12])\.",
    re.IGNORECASE,
)
#: What a list of layers is called, for one that has a single layer.
_LAYERS = re.compile(r"(^|[._])(layers?|blocks?|h)\.$")


@dataclass(frozen=True)
class LayerStack:
    """The layers of one checkpoint: tensor ``{prefix}{layer}.{rest}`` for each layer."""

    prefix: str
    num_layers: int

    def split(self, name: str) -> tuple[int, str] | None:
        """Layer number and remaining name of a tensor of the stack, else None."""
        match = _NUMBERED.match(name)
        if match is None or match["prefix"] != self.prefix:
            return None
        return int(match["index"]), match["rest"]

    def join(self, layer: int, rest: str) -> str:
        return f"{self.prefix}{layer}.{rest}"


def find_stack(checkpoint: Checkpoint, names: Collection[str] | None = None) -> LayerStack | None:
    """The layer stack of a checkpoint, or of those of its tensors that are ``names``.

    None where no name is numbered.
    """
    stacks = _numbered(checkpoint.tensors if names is None else names)
    if not stacks:
        return None
    sizes = dict.fromkeys(stacks, 0)
    for name in checkpoint.tensors if names is None else names:
        match = _NUMBERED.match(name)
        if match and match["prefix"] in sizes:
            sizes[match["prefix"]] += checkpoint.tensors[name].num_bytes
    declared = layer_count(checkpoint.config)
    exact = [prefix for prefix, count in stacks.items() if count == declared]
    prefix = max(exact or stacks, key=lambda p: (sizes[p], p))
    return LayerStack(prefix, stacks[prefix])


def find_stacks(names: Collection[str]) -> dict[str, LayerStack]:
    """Every layer stack among the tensors of a checkpoint, by prefix."""
    return {
        prefix: LayerStack(prefix, count)
        for prefix, count in _numbered(names).items()
        if count > 1 or _LAYERS.search(prefix)
    }


def _numbered(names: Collection[str]) -> dict[str, int]:
    """Prefix → how many numbers follow it, where they are 0, 1, 2, ..."""
    layers: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            layers.setdefault(match["prefix"], set()).add(int(match["index"]))
    return {p: len(found) for p, found in layers.items() if found == set(range(len(found)))}


def layer_prefix(name: str) -> str | None:
    """What stands before the first number of a tensor's name."""
    match = _NUMBERED.match(name)
    return None if match is None else match["prefix"]


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers is an input of the first layer (an embedding)."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)


def embedding_of(checkpoint: Checkpoint) -> TensorEntry | None:
    """The token embedding that a tied output head shares."""
    shared = checkpoint.tensors.get("shared.weight")  # encoder, decoder and head of T5
    return shared or next(
        (e for n, e in checkpoint.tensors.items() if n.endswith(_EMBEDDINGS)), None
    )


#: Architectures whose linear layers are transformers' Conv1D, and the names of these.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


def is_transposed(config: Mapping[str, object] | None, name: str) -> bool:
    """Whether a weight is stored as [inputs, outputs]."""
    model_type = (config or {}).get("model_type")
    if is_transposed_pack(config, name):
        return True
    return model_type in CONV1D_MODELS and _CONV1D.search(name) is not None
