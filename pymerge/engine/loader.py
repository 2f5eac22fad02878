"""Bring the tiles of one job into memory: each source is read once, and the updates of adapters are
put on what was read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pymerge.checkpoint import AdapterTensor, DerivedTensor, TensorEntry
from pymerge.engine.blocks import Stopped
from pymerge.engine.context import Context
from pymerge.engine.derived import make_tile
from pymerge.engine.updates import float_view
from pymerge.formats import BYTES, F32
from pymerge.methods.protocol import Tile
from pymerge.ops.view import View
from pymerge.plan import Inputs, Job


class TileLoader:
    """How the tensor of one job is cut into tiles, and how they are read."""

    def __init__(self, context: Context, job: Job) -> None:
        tiling = context.plan.tiling
        self.tile_elements = tiling.tile_elements(job)
        self.num_tiles = tiling.num_tiles(job)
        self.context = context
        self._job = job

    def span(self, index: int) -> tuple[int, int]:
        """First element and number of elements of a tile."""
        start = index * self.tile_elements
        return start, min(self.tile_elements, self._job.num_elements - start)

    def tile_bytes(self, index: int, inputs: Inputs) -> int:
        """Bytes that are read for a tile."""
        _, num = self.span(index)
        return sum(-(-num * entry.format.bits // 8) for entry in inputs.sources)

    def read_tile(self, index: int, blocks: Sequence[int], inputs: Inputs) -> Tile:
        """Read one tile, as :meth:`read_span` does."""
        return self.read_span(*self.span(index), blocks, inputs)

    def read_span(self, start: int, num: int, blocks: Sequence[int], inputs: Inputs) -> Tile:
        """Bring ``num`` elements from element ``start`` on into the first ``inputs.num_arrays``
        blocks; a source that is named twice is read once, whatever updates are put on it.

        The job's updates are held (``Updates.hold``).

        :raises Stopped: the run is ending.
        """
        job = self._job
        views: dict[Hashable, View] = {}
        arrays = list(zip(inputs.sources, blocks, strict=False))
        plain = [(e, block) for e, block in arrays if not isinstance(e, DerivedTensor)]
        num_bytes = sum(-(-num * entry.format.bits // 8) for entry, _ in plain)
        with self.context.events.stage("read", job.name, num_bytes):
            for entry, block in plain:
                bits, code = entry.format.bits, entry.format.code
                num_bytes = -(-num * bits // 8)
                address = self.read(entry, start * bits // 8, num_bytes, block)
                views[entry.key] = (
                    View(address, BYTES, num_bytes) if code is None else View(address, code, num)
                )
        scratch = blocks[len(inputs.sources) + len(inputs.updates) : inputs.num_arrays]
        for entry, block in arrays:
            if isinstance(entry, DerivedTensor):
                views[entry.key] = make_tile(self, entry, start, num, block, scratch)
        updated = {}
        for entry, block in zip(inputs.updates, blocks[len(inputs.sources) :], strict=False):
            out = updated[entry] = float_view(block, F32, num)
            weight = views[entry.key]
            self.context.updates.put_on(job, entry, start, weight, out)

        def view_of(entry: TensorEntry) -> View:
            if isinstance(entry, AdapterTensor) and entry in updated:
                return updated[entry]
            return views[entry.key]

        base = None if inputs.base is None else view_of(inputs.base)
        models, diagonals = (
            tuple(view_of(entry) for entry in entries)
            for entries in (inputs.models, inputs.diagonals)
        )
        return Tile(start, num, base, models, diagonals)

    def read(
        self, entry: TensorEntry, first: int, num_bytes: int, block: int, size: int | None = None
    ) -> int:
        """Read bytes of a tensor into a block, or into ``size`` bytes of one; returns the address
        where they begin."""
        if self.context.stopping:
            raise Stopped
        size = self.context.pool.block_bytes if size is None else size
        return self.context.sources.read(entry, first, num_bytes, block, size)
