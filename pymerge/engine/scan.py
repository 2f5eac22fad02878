"""Read every tensor of one checkpoint and count its non-finite elements."""

from __future__ import annotations

from pymerge import _C
from pymerge.checkpoint import Checkpoint, stored_entries
from pymerge.engine.sources import Sources
from pymerge.ops import count_nonfinite as count
from pymerge.ops.view import View

BLOCK_BYTES = 4 << 20
SLACK = 8192


def count_nonfinite(checkpoint: Checkpoint) -> dict[str, int]:
    """Tensor name → count of NaN and infinite elements, those of codes and scales where a tensor
    is made of them; 0 for tensors that are no floats.

    :raises StorageError: a file cannot be read.
    """
    arena = _C.Arena(BLOCK_BYTES + SLACK)
    sources = Sources(checkpoint.headers)
    found: dict[str, int] = {}
    try:
        for name, tensor in checkpoint.tensors.items():
            found[name] = 0
            for entry in stored_entries(tensor):
                if entry.format.code is None:
                    continue
                for first in range(0, entry.num_bytes, BLOCK_BYTES):
                    size = min(BLOCK_BYTES, entry.num_bytes - first)
                    address = sources.read(entry, first, size, arena.address, BLOCK_BYTES + SLACK)
                    found[name] += count(
                        View(address, entry.format.code, size // entry.format.num_bytes)
                    )
    finally:
        sources.close()
    return found
