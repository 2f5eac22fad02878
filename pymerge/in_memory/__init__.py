"""Merging tensors that are in memory already: one driver answers the methods' questions for
:func:`merge_tensor`, :func:`pymerge.merge_state_dicts` and :class:`pymerge.Session`."""

from __future__ import annotations

from pymerge.in_memory.beside import TaskTensor
from pymerge.in_memory.tensor import merge_tensor

__all__ = ["TaskTensor", "merge_tensor"]
