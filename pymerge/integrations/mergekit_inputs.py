"""Where the tensors lie that mergekit's loading tasks read: entries of checkpoints, no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.errors import CheckpointError
from pymerge.formats import BY_TORCH_NAME, Format
from pymerge.integrations.mergekit_renaming import Renaming
from pymerge.integrations.mergekit_tally import LOG
from pymerge.plan.vocabulary import first_rows

_GATHER = ("mergekit.io.tasks", "GatherTensors")
_LOAD = ("mergekit.io.tasks", "LoadTensor")
_TRUNCATED = ("mergekit.tokenizer.truncate", "TruncatedVocabulary")
_FLAT = ("mergekit.merge_methods.task_adapter", "TensorDictWrapper")
_LOAD_FLAT = ("mergekit.scripts.merge_raw_pytorch", "SimpleLoadTensor")
#: Why tensors are left that mergekit copies where they are the same in all models.
NO_NUMBERS = "tensors that hold no floating-point numbers"


class LeftToMergekit(Exception):
    """A task that we do not lower; the text says why and is part of a message."""


def kind_of(task: Any) -> tuple[str, str]:
    """The class of a task. One derived from a class of mergekit is another one."""
    return type(task).__module__, type(task).__qualname__


def format_of(name: str | None) -> Format | None:
    """The format of a dtype as mergekit writes it, None for none.

    :raises LeftToMergekit: we do not compute in it.
    """
    if name is None:
        return None
    format = BY_TORCH_NAME.get(str(name).removeprefix("torch."))
    if format is None or not format.is_float or not format.writable:
        raise LeftToMergekit(f"dtype {name}")
    return format


class Inputs:
    """The checkpoints behind mergekit's loaders, opened when first needed."""

    def __init__(self) -> None:
        self._by_place: dict[Path, Checkpoint] = {}
        self._renamings: dict[Path, Renaming] = {}
        self.checkpoints: dict[str, Checkpoint] = {}

    def entries(self, task: Any) -> tuple[dict[Any, TensorEntry], Format | None]:
        """What a task gathers: model → its tensor, and the format they are converted to.

        :raises LeftToMergekit: not a task or tensor that we lower.
        :raises CheckpointError: a model is not what it claims to be.
        """
        kind = kind_of(task)
        if kind == _GATHER:
            loads = {load.model: load for load in task.arguments().values()}
            return self._loaded(loads, _LOAD)
        if kind == _FLAT:
            return self._loaded(dict(task.tensors.items()), _LOAD_FLAT)
        if kind == _TRUNCATED:
            found, format = self.entries(task.gather_tensors)
            return _first_rows(found, task.weight_info), format
        raise LeftToMergekit(f"inputs made by {kind[1]}")

    def _loaded(
        self, loads: Mapping[Any, Any], expected: tuple[str, str]
    ) -> tuple[dict[Any, TensorEntry], Format | None]:
        found = {}
        formats = set()
        for model, load in loads.items():
            if kind_of(load) != expected:
                raise LeftToMergekit(f"inputs made by {kind_of(load)[1]}")
            formats.add(format_of(load.dtype))
            entry = self._entry(model, load) if expected == _LOAD else self._flat_entry(load)
            if not entry.format.is_float:
                raise LeftToMergekit(NO_NUMBERS)
            found[model] = entry
        if len(formats) > 1:
            raise LeftToMergekit("inputs of one tensor that are converted differently")
        return found, formats.pop() if formats else None

    def _entry(self, model: Any, load: Any) -> TensorEntry:
        from mergekit.io.tasks import LoaderCache

        loader = LoaderCache().get(model)
        name = load._resolve_name(loader)
        index = loader.index
        place = Path(index.base_path)
        if name is not None:
            return self._named(str(model), place, index.tensor_paths[name], name)
        checkpoint = self._open(str(model), place)
        if place not in self._renamings:
            self._renamings[place] = Renaming(checkpoint.tensors)
        entry = self._renamings[place].find(load)
        if entry is None and load.optional:
            raise LeftToMergekit("tensors that a model lacks")
        if entry is None:
            raise LeftToMergekit("tensors in another layout than their checkpoint's")
        return entry

    def _flat_entry(self, load: Any) -> TensorEntry:
        from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

        index = SimpleLoaderCache().get(load.model).index
        if load.tensor_name not in index.tensor_paths:
            raise LeftToMergekit("tensors that a model lacks")
        return self._named(load.model, Path(load.model), None, load.tensor_name)

    def _named(self, reference: str, place: Path, file: str | None, name: str) -> TensorEntry:
        """The entry of a tensor in the checkpoint of a folder or file."""
        checkpoint = self._open(reference, place)
        entry = checkpoint.tensors.get(name)
        if entry is None:
            where = "" if file is None else f" by its index, in {file}"
            raise CheckpointError(
                f"model {reference}: mergekit reads the tensor {name!r}{where}, pymerge finds none "
                f"in {place}; is there more than one model in that folder?"
            )
        return entry

    def _open(self, reference: str, place: Path) -> Checkpoint:
        if place not in self._by_place:
            self._by_place[place] = open_checkpoint(str(place), allow_pickle=True)
        return self.checkpoints.setdefault(
            reference, replace(self._by_place[place], reference=reference)
        )


def _first_rows(found: dict[Any, TensorEntry], weight: Any) -> dict[Any, TensorEntry]:
    """The tensors cut to the rows that all of them have."""
    shapes = {entry.shape for entry in found.values()}
    if len(shapes) <= 1:
        return found
    if weight.vocabulary_axis != 0 or len({shape[1:] for shape in shapes}) > 1:
        raise LeftToMergekit("vocabularies that are cut along another axis than the first")
    rows = min(shape[0] for shape in shapes)
    LOG.warning(
        "UNSAFE vocabulary truncation: of %s the first %d rows of each model are merged, whatever "
        "token they stand for",
        weight.name,
        rows,
    )
    return {model: first_rows(entry, rows) for model, entry in found.items()}
