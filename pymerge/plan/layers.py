"""Which tensors belong to which layer, told by the ``.N.`` in their names.

The layer stack of a checkpoint is the prefix before the first number of its tensor names that holds
as many layers as config.json says, or the largest one. All other tensors stand before the layers
(embeddings) or after them (final norm, head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint, TensorEntry, is_head, layer_count

_NUMBERED = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?P<index>\d+)\.(?P<rest>.+)$")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_BEFORE_LAYERS = re.compile(r"embed|wte|wpe|position|token_type|patch", re.IGNORECASE)


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


def find_stack(checkpoint: Checkpoint) -> LayerStack | None:
    """The layer stack of a checkpoint, or None where no name is numbered."""
    layers: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for name, entry in checkpoint.tensors.items():
        match = _NUMBERED.match(name)
        if match:
            layers.setdefault(match["prefix"], set()).add(int(match["index"]))
            sizes[match["prefix"]] = sizes.get(match["prefix"], 0) + entry.num_bytes
    stacks = {p: found for p, found in layers.items() if found == set(range(len(found)))}
    if not stacks:
        return None
    declared = layer_count(checkpoint.config)
    exact = [prefix for prefix, found in stacks.items() if len(found) == declared]
    prefix = max(exact or stacks, key=lambda p: (sizes[p], p))
    return LayerStack(prefix, len(stacks[prefix]))


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers is an input of the first layer (an embedding)."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)


def embedding_of(checkpoint: Checkpoint) -> TensorEntry | None:
    """The token embedding that a tied output head shares."""
    return next((e for n, e in checkpoint.tensors.items() if n.endswith(_EMBEDDINGS)), None)


#: Architectures whose linear layers are transformers' Conv1D, and the names of these.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


def is_transposed(config: Mapping[str, object] | None, name: str) -> bool:
    """Whether a weight is stored as [inputs, outputs]."""
    model_type = (config or {}).get("model_type")
    return model_type in CONV1D_MODELS and _CONV1D.search(name) is not None
