"""Tensors that mergekit computes itself in a merge of ours: whether it can, and as our inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint import Checkpoint, TensorEntry, read_header
from pymerge.errors import PlanError
from pymerge.integrations.mergekit_graph import Lowering, copy_job
from pymerge.integrations.mergekit_inputs import NO_NUMBERS
from pymerge.integrations.mergekit_tally import LOG
from pymerge.plan.model import Job
from pymerge.recipe.names import MERGEKIT_METHODS


class Output(NamedTuple):
    """One tensor that the graph puts out: the task that asks for it, and the one that makes it."""

    target: Any
    name: str
    made_by: Any
    dtype: str | None
    optional: bool


def check_left(reasons: Counter[str], lowering: Lowering) -> None:
    """:raises PlanError: the method is ours, so that mergekit has nothing to merge them with."""
    spec = lowering.method.spec
    merged = {reason: count for reason, count in reasons.items() if reason != NO_NUMBERS}
    if not merged:
        return
    if spec.name not in MERGEKIT_METHODS:
        found = "; ".join(f"{count} are {reason}" for reason, count in merged.items())
        raise PlanError(
            f"{spec.name} is pymerge's own method, so that mergekit cannot merge what pymerge does "
            f"not read: {found}. Choose another method, or models of one shape and layout"
        )
    if "seed" in spec.parameters and lowering.numerics == "mergekit":
        LOG.warning(
            "%s draws at random: with tensors left to mergekit the masks are others than its own",
            spec.name,
        )


class Made:
    """What mergekit's tasks made, in files of ``folder``, and the drafts that read them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoints: dict[str, Checkpoint] = {}
        self._folder = folder

    def tensors(self, outputs: Sequence[Output], value: Any) -> Iterator[tuple[str, Job]]:
        """A tensor that mergekit merged is copied to its outputs.

        :raises RuntimeError: it must exist and mergekit gave none, as mergekit does.
        """
        from mergekit.common import dtype_from_name

        for output in outputs:
            if value is None:
                if not output.optional:
                    raise RuntimeError(f"No value for required tensor {output.name}")
                continue
            dtype = dtype_from_name(output.dtype)
            entry = self._write(value if dtype is None else value.to(dtype))
            yield output.name, copy_job(output.name, entry, entry.format, entry.file.name)

    def _write(self, tensor: Any) -> TensorEntry:
        from safetensors.torch import save_file

        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{len(self.checkpoints):05d}.safetensors"
        save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
        header = read_header(path)
        self.checkpoints[path.name] = Checkpoint(path.name, None, (header,), header.tensors, None)
        return header.tensors["tensor"]
