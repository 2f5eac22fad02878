"""Packed experts are merged one by one: a job for each matrix of a tensor [experts, ...]."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from pymerge.checkpoint import TensorEntry, cut, is_packed, update_of
from pymerge.methods.numerics import Numerics
from pymerge.methods.protocol import Method, Tensor
from pymerge.ops.opset import OpSet
from pymerge.plan.model import Job, Piece


def split_experts(
    drafts: Sequence[Job], method: Method, ops: OpSet, numerics: Numerics
) -> list[Job]:
    """The drafts, those of packed experts as one for each expert where that makes a difference.

    A map of single elements gives the same without. With mergekit's numerics, and for methods that
    put more beside the model, whose names are those of whole tensors, packed experts stay whole.
    """
    if numerics == "mergekit" or method.extras:
        return list(drafts)
    return [job for draft in drafts for job in _pieces(draft, method, ops)]


def differs_by_expert(method: Method, tensor: Tensor) -> bool:
    """Whether a tensor is packed experts of which the method makes something else one by one."""
    if not tensor.num_elements or not is_packed(tensor.name, tensor.shape):
        return False
    costs = method.cost is not None and method.cost(tensor).num_bytes
    return bool(method.looks(tensor) or method.model_wide(tensor) or costs)


def _pieces(draft: Job, method: Method, ops: OpSet) -> Iterator[Job]:
    if draft.kind == "copy" or not _can_be_cut(draft):
        yield draft
        return
    if not differs_by_expert(method, draft.tensor(ops)):
        yield draft
        return
    count, *shape = draft.shape
    num = draft.num_elements // count
    for expert in range(count):
        made: dict[Hashable, TensorEntry] = {}

        def piece_of(
            entry: TensorEntry,
            made: dict[Hashable, TensorEntry] = made,
            first: int = expert * num,
        ) -> TensorEntry:
            """One object for each source, whoever names it."""
            if entry.key not in made:
                made[entry.key] = cut(entry, first, shape, f"{entry.name}[{first // num}]")
            return made[entry.key]

        yield replace(
            draft,
            name=f"{draft.name}[{expert}]",
            piece=Piece(draft.name, expert, count),
            shape=tuple(shape),
            base=None if draft.base is None else piece_of(draft.base),
            models=tuple(map(piece_of, draft.models)),
            statistics=tuple(map(piece_of, draft.statistics)),
        )


def _can_be_cut(draft: Job) -> bool:
    """Whether everything that the job's tensor is made of can be taken apart."""
    entries = draft.models if draft.base is None else (draft.base, *draft.models)
    return not any(update_of(entry) is not None for entry in entries) and all(
        entry.shape == draft.shape for entry in draft.statistics
    )
