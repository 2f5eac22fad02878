"""Making the tiles of a tensor that another merge gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.engine.updates import float_view
from pymerge.methods.protocol import Apply, decide
from pymerge.ops.view import View
from pymerge.plan.merged import MergedTensor

if TYPE_CHECKING:
    from pymerge.engine.loader import TileLoader


def make_merged(
    loader: TileLoader,
    entry: MergedTensor,
    start: int,
    num: int,
    block: int,
    scratch: Sequence[int],
) -> View:
    """Run the inner merge on this tile alone: its method is a map, so that its elements do not
    depend on where the tile was cut."""
    context, job = loader.context, entry.job
    inner = type(loader)(context, job)
    tensor = job.tensor(context.ops)
    if job.kind == "copy":
        apply = Apply(lambda tile, out: context.ops.convert(out, tile.models[0]))
    else:
        apply = decide(entry.method, tensor, _no_question)
    tile = inner.read_span(start, num, scratch, job.inputs(apply.models))
    out = float_view(block, job.format, num)
    with (
        context.computing(job.name, num * job.format.num_bytes),
        context.here(tile, (out,)) as (there, outputs),
    ):
        apply.run(there, outputs[0])
    return out


def _no_question(question: object) -> object:
    raise RuntimeError(f"a merge without looks asked {type(question).__name__}")
