"""One task's model as a state dict, put together in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pymerge.checkpoint import TensorEntry, refuse_derived
from pymerge.errors import CheckpointError, StorageError
from pymerge.formats import BYTES
from pymerge.machine import compute_threads
from pymerge.ops.executor import Executor, make_executor
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import View
from pymerge.runtime.task_folder import Delta, open_tasks

#: Elements put together at once in each thread; a multiple of 8, so that masks begin with a byte.
PIECE = 1 << 20


def load_task(
    out: str | os.PathLike[str],
    task: str | int,
    *,
    threads: int | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """The model of one task of a merge by emr or tall_masks, as torch tensors on the CPU.

    :param out: the merged folder.
    :param task: the task's name, that is its model in the recipe, its number from 0, or a part of
        its name that fits no other.
    :param threads: compute threads, default all CPUs available.
    :returns: tensors by name, in the formats of the base.
    :raises CheckpointError: the folder is no such merge or is damaged.
    :raises PymergeError: there is no such task; the message names those there are.
    """
    folder = open_tasks(os.fspath(out))
    chosen = folder.find(task)
    num_threads = compute_threads(threads)
    executor = make_executor(choose_ops(("apply_task",), asked=backend), num_threads)

    def load(entry: TensorEntry) -> Any:
        return _load(entry, folder.delta(entry.name, chosen), chosen.scale, executor)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            entries = folder.checkpoint.tensors
            return dict(zip(entries, pool.map(load, entries.values()), strict=True))
    finally:
        executor.close()


def _load(entry: TensorEntry, delta: Delta | None, scale: float, executor: Executor) -> Any:
    import torch

    if entry.format.torch_name is None or not hasattr(torch, entry.format.torch_name):
        raise CheckpointError(
            f"{entry.file}, tensor {entry.name!r}: torch has no dtype for {entry.format.name}"
        )
    result = torch.empty(entry.shape, dtype=getattr(torch, entry.format.torch_name))
    if not entry.num_bytes:
        return result
    code, size = entry.format.code, entry.format.num_bytes
    if delta is None or code is None:
        read_into(entry, 0, result.reshape(-1).view(torch.uint8).numpy())
        return result
    whole = View(result.data_ptr(), code, result.numel())
    length = min(PIECE, whole.num)
    scratch = [np.empty(n, np.uint8) for n in (length * size, length * size, -(-length // 8))]
    for first in range(0, whole.num, PIECE):
        num = min(PIECE, whole.num - first)
        views = _read_piece(entry, delta, first, num, scratch)
        with executor.here(views, (whole.part(first, num),)) as ((base, vector, mask), outputs):
            executor.ops.apply_task(outputs[0], base, vector, mask.ptr, scale=scale)
    return result


def _read_piece(
    entry: TensorEntry, delta: Delta, first: int, num: int, scratch: Sequence[np.ndarray[Any, Any]]
) -> list[View]:
    views = []
    for each, memory in zip((entry, *delta), scratch, strict=True):
        bits, code = each.format.bits, each.format.code
        piece = memory[: -(-num * bits // 8)]
        read_into(each, first * bits // 8, piece)
        num_items, kind = (piece.size, BYTES) if code is None else (num, code)
        views.append(View(piece.ctypes.data, kind, num_items))
    return views


def read_into(entry: TensorEntry, first_byte: int, into: np.ndarray[Any, Any]) -> None:
    """Fill memory with a tensor's bytes. Raises StorageError."""
    refuse_derived(entry)
    left = memoryview(into.data)
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset + first_byte)
            while left:
                count = file.readinto(left)
                if not count:
                    raise StorageError(
                        f"{entry.file}, tensor {entry.name!r}: expected {len(left)} more bytes, "
                        "found none; the file was cut short: copy it again"
                    )
                left = left[count:]
    except OSError as error:
        raise StorageError(f"reading tensor {entry.name!r} of {entry.file}: {error}") from error
