"""Mixture of experts: a tensor for each expert, or all of them packed into one.

    per expert    ...experts.0.gate_proj.weight [inner, width], up_proj [inner, width],
                  down_proj [width, inner]; Mixtral calls them w1, w3, w2
    packed        ...experts.gate_up_proj [experts, 2 inner, width], down_proj [experts, width,
                  inner], with gate and up one after the other along the outputs

A checkpoint keeps the layout that it came in. Where models of one merge differ, each is read in the
layout of the one that gives the output its names; these two are told apart by their names and
shapes (transformers' ``conversion_mapping``: ``MergeModulelist`` and ``Concatenate(dim=1)``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from pymerge.checkpoint.adapter import update_of
from pymerge.checkpoint.config import TEXT_KEYS
from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.parts import cut, joined
from pymerge.checkpoint.source import Checkpoint
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

#: What the experts' tensors are packed of, by the last part of the name, along the outputs.
_PACKINGS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
#: Models whose packed experts lie as [inputs, outputs]; gpt-oss takes gate and up turn by turn.
TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe"})
#: Names of the block around the experts that mean the same.
_BLOCKS = (".mlp.", ".block_sparse_moe.")
_EXPERTS = re.compile(r"(?:^|\.)experts\.")
_PACKED = re.compile(r"(?P<prefix>(?:.*\.)?experts\.)(?P<leaf>gate_up_proj|down_proj)")
_SINGLE = re.compile(r"(?P<prefix>(?:.*\.)?experts\.)(?P<number>\d+)\.(?P<leaf>\w+)\.weight")
_ROUTER = re.compile(r".*\.(?:mlp|block_sparse_moe)\.gate\.weight")


def is_packed(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor holds a matrix for each expert: its name says experts, and it has three
    dimensions."""
    return len(shape) == 3 and _EXPERTS.search(name) is not None


def is_transposed_pack(config: Mapping[str, object] | None, name: str) -> bool:
    """Whether the matrices of packed experts lie as [inputs, outputs]."""
    return _model_types(config) & TRANSPOSED_EXPERTS != set() and bool(_PACKED.fullmatch(name))


def laid_out_like(opened: Checkpoint, donor: Checkpoint) -> Checkpoint:
    """The checkpoint with its experts in the donor's layout; nothing is read.

    :raises CheckpointError: it has them in another one that is not known to mean the same.
    """
    missing = [name for name in donor.tensors if name not in opened.tensors]
    if not any(_EXPERTS.search(name) for name in missing):
        return opened
    layout = _Layout(opened, donor)
    for name in missing:
        layout.find(name)
    if not layout.found:
        return opened
    kept = {name: e for name, e in opened.tensors.items() if name not in layout.used}
    return replace(opened, tensors={**kept, **layout.found})


class _Layout:
    """The tensors of one checkpoint under another's names."""

    def __init__(self, opened: Checkpoint, donor: Checkpoint) -> None:
        self._opened = opened
        self._donor = donor
        self._tensors = opened.tensors
        self.found: dict[str, TensorEntry] = {}
        self.used: set[str] = set()

    def find(self, name: str) -> None:
        """Look for a tensor that the donor has under this name."""
        if _ROUTER.fullmatch(name):
            other = next((o for o in _spellings(name) if o in self._tensors), None)
            if other is not None:
                self.found[name] = replace(self._tensors[other], name=name)
                self.used.add(other)
        elif match := _PACKED.fullmatch(name):
            if is_packed(name, self._donor.tensors[name].shape):
                self._pack(name, match["prefix"], match["leaf"])
        elif match := _SINGLE.fullmatch(name):
            self._take_apart(name, match["prefix"], int(match["number"]), match["leaf"])

    def _pack(self, name: str, prefix: str, leaf: str) -> None:
        wanted = self._donor.tensors[name]
        for place in _spellings(prefix):
            for leaves in _PACKINGS[leaf]:
                names = [
                    f"{place}{expert}.{each}.weight"
                    for expert in range(wanted.shape[0])
                    for each in leaves
                ]
                if names[0] in self._tensors:
                    self._join(name, wanted, names, f"{place}{wanted.shape[0]}.{leaves[0]}.weight")
                    return

    def _join(self, name: str, wanted: TensorEntry, names: list[str], beyond: str) -> None:
        if any(each not in self._tensors for each in names) or beyond in self._tensors:
            self._refuse(names[0], f"{wanted.shape[0]} experts as in {shown(name)}", "others")
        parts = [self._tensors[each] for each in names]
        per_expert = len(names) // wanted.shape[0]
        rows = sum(part.shape[0] for part in parts[:per_expert] if len(part.shape) == 2)
        shapes = {part.shape[1:] for part in parts}
        transposed = is_transposed_pack(self._donor.config, name)
        if shapes != {wanted.shape[2:]} or rows != wanted.shape[1] or transposed:
            self._refuse(
                names[0],
                f"what makes {shown(name)} {list(wanted.shape)} of the base, gate and up one after "
                "the other along the outputs",
                f"shape {list(parts[0].shape)} where the base's layout is another",
            )
        if any(update_of(part) is not None for part in parts):
            self._refuse(names[0], "experts without an adapter", "one on them")
        if len({part.format for part in parts}) > 1:
            self._refuse(names[0], "experts of one type", "several")
        self.found[name] = joined(name, wanted.shape, parts)
        self.used.update(names)

    def _take_apart(self, name: str, prefix: str, number: int, leaf: str) -> None:
        wanted = self._donor.tensors[name]
        for packed_leaf, choices in _PACKINGS.items():
            leaves = next((each for each in choices if leaf in each), None)
            places = [f"{place}{packed_leaf}" for place in _spellings(prefix)]
            place = next((each for each in places if each in self._tensors), None)
            if leaves is None or place is None:
                continue
            packed = self._tensors[place]
            position = leaves.index(leaf)
            fits = (
                len(packed.shape) == 3
                and number < packed.shape[0]
                and packed.shape[1:] == (len(leaves) * wanted.shape[0], *wanted.shape[1:])
                and f"{prefix}{packed.shape[0] - 1}.{leaf}.weight" in self._donor.tensors
                and f"{prefix}{packed.shape[0]}.{leaf}.weight" not in self._donor.tensors
            )
            if not fits or is_transposed_pack(self._opened.config, place):
                self._refuse(
                    place,
                    f"the experts of the base packed, {' and '.join(leaves)} of "
                    f"{list(wanted.shape)} along the outputs",
                    f"shape {list(packed.shape)} in another layout or of other experts",
                )
            if update_of(packed) is not None:
                self._refuse(place, "experts without an adapter", "one on them")
            first = (number * len(leaves) + position) * wanted.num_elements
            self.found[name] = cut(packed, first, wanted.shape, name)
            self.used.add(place)
            return

    def _refuse(self, name: str, expected: str, found: str) -> NoReturn:
        raise CheckpointError(
            f"model {shown(self._opened.reference)}, tensor {shown(name)}: expected {expected}, "
            f"found {found}; load and save the model with the transformers version that saved "
            f"{self._donor.reference}, so that both have one layout"
        )


def _spellings(name: str) -> list[str]:
    """The name, and the same with other names of the block around the experts."""
    found = [name]
    for one in _BLOCKS:
        for other in _BLOCKS:
            if one != other and one in name:
                found.append(name.replace(one, other))
    return found


def _model_types(config: Mapping[str, object] | None) -> set[object]:
    parts = [config or {}]
    parts += [part for key in TEXT_KEYS if isinstance(part := parts[0].get(key), dict)]
    return {part.get("model_type") for part in parts}
