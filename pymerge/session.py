"""Merging the same models again and again with other coefficients."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.errors import PymergeError, RecipeError
from pymerge.in_memory.arguments import Settings, check_names, named
from pymerge.in_memory.driver import nonfinite
from pymerge.in_memory.items import Held, Item, Whole, span_of
from pymerge.in_memory.planned import plan, sentence_of_nonfinite, warn
from pymerge.in_memory.targets import Targets, settle

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymerge.methods.numerics import Numerics

    StateDict = Mapping[str, torch.Tensor] | nn.Module

#: The parameter that ``weights`` stands for.
WEIGHT = "weight"


class Session:
    """Models in memory that are merged many times: a search pays milliseconds for a candidate.

    The models' tensors are used where they are; those that are not contiguous, or that a mapping
    reads from files, are copied once. What a method measures that the changed parameters have no
    part in (the thresholds of ties for a density, the inner products of slerp, karcher or model
    stock) is measured once. Methods that compute with matrices do all of it again.

    :meth:`merge` may be called from any thread; one merge runs at a time. The models must not
    change while the session is open. Close it, or use it as a context manager, to end its threads.

    :param parameters: the method's parameters for all merges, as for
        :func:`pymerge.merge_state_dicts`; a call's own take their place. The others are those of
        :func:`pymerge.merge_state_dicts`.
    :raises RecipeError: the method has no such parameter, or takes another number of models.
    :raises PymergeError: the models do not fit together, or the method makes no dense model.
    """

    def __init__(
        self,
        base: StateDict | None,
        experts: Sequence[StateDict],
        *,
        method: str,
        dtype: Any | None = None,
        out_dtype: Any | None = None,
        numerics: Numerics = "accurate",
        threads: int | None = None,
        backend: str | None = None,
        statistics: Sequence[Mapping[str, Any]] | None = None,
        **parameters: Any,
    ) -> None:
        self._planned = plan(
            "Session",
            base,
            experts,
            method=method,
            numerics=numerics,
            dtype=dtype,
            out_dtype=out_dtype,
            threads=threads,
            backend=backend,
            statistics=statistics,
        )
        self._lock = threading.Lock()
        self._closed = False
        # The inputs, in the order of names; read by the first merge.
        self._held: list[Held] | None = None
        # What was measured of each tensor, for the next merges.
        self._memories: defaultdict[str, dict[Hashable, Any]] = defaultdict(dict)
        self._driver = self._planned.driver()
        try:
            self._defaults = named(parameters)
            check_names(self._planned.method.spec, self._defaults)
            self._merged = self._planned.merged
            #: The merged tensors, in order: the rows of weights for each tensor.
            self.names = tuple(entry.name for entry in self._merged)
            self._places = {name: place for place, name in enumerate(self.names)}
            self._copies = [
                (entry, self._planned.dicts.source_of_copy(entry))
                for entry in self._planned.dicts.entries
                if not entry.merged
            ]
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_checkpoints(
        cls, base: str | Path | None, experts: Sequence[str | Path], **arguments: Any
    ) -> Session:
        """A session over checkpoints' folders, whose safetensors files are mapped into memory.

        Needs the package safetensors. ``arguments`` are those of the class.

        :raises CheckpointError: a folder is not a valid checkpoint.
        :raises PymergeError: a model is not stored in plain safetensors files.
        """
        mapped = None if base is None else mapped_tensors(base)
        return cls(mapped, [mapped_tensors(each) for each in experts], **arguments)

    def merge(
        self, weights: Any | None = None, *, out: StateDict | None = None, **parameters: Any
    ) -> Any:
        """Merge with these parameters and return ``out``, or new tensors by name.

        :param weights: the method's ``weight``: a number for all experts; one for each; an array
            [tensors, experts] in the order of :attr:`names`; a function of the tensor's name; or a
            mapping from parts of names to any of the first two.
        :param out: a module, or a mapping of tensors, that is written in place; its tensors keep
            their dtype, and share no memory with the session's inputs.
        :raises RecipeError: a parameter is unknown, missing, or its value is not allowed.
        :raises PymergeError: ``out`` does not fit, or the session is closed.
        """
        given = named(parameters)
        if weights is not None:
            if WEIGHT in given:
                raise RecipeError("Session.merge: expected weights or weight, found both")
            given[WEIGHT] = weights
        given = {**self._defaults, **given}
        settings = Settings(
            self._planned.method.spec,
            {name: self._by_name(name, value) for name, value in given.items()},
            self._planned.dicts.num_models,
        )
        with self._lock:
            if self._closed:
                raise PymergeError("Session.merge: the session is closed; make a new one")
            return self._merge(settings, out)

    def by_layer(
        self, weights: Any, outside: Any = None, *, prefix: str | None = None
    ) -> dict[str, Any]:
        """Weights of each layer as a mapping that ``weights`` takes.

        :param weights: [layers, experts]: rows for the tensors named PREFIX.0.*, PREFIX.1.*, ...
        :param outside: the weights of all other tensors; needed where there are such.
        :param prefix: what stands before the number; default: the one with the most layers.
        :raises PymergeError: no tensors are numbered so, or there are not as many rows as layers.
        """
        return _by_layer(self.names, weights, outside, prefix)

    def close(self) -> None:
        """End the threads and let go of the models."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._driver.close()
                self._held, self._copies = None, []
                self._memories.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _merge(self, settings: Settings, out: Any | None) -> Any:
        planned = self._planned
        targets = Targets(out, planned.dicts.entries, "Session.merge")
        items = self._prepared(settings, targets)
        merged = [item for item in items if not planned.is_copy(item.entry, item.tensor)]
        settle(planned.dicts.device)
        written = self._driver.merge(merged)
        for item in items:
            if planned.is_copy(item.entry, item.tensor):
                targets.copy(item.entry, item.whole.held().models[0])
        for entry, source in self._copies:
            targets.copy(entry, source)
        sentences = [f"{each.name}: {s}" for each in written for s in sorted(each.sentences)]
        warn([*sentences, *sentence_of_nonfinite(nonfinite(written))])
        if out is not None:
            return out
        return {name: targets.tensors[name] for name in planned.dicts.names}

    def _prepared(self, settings: Settings, targets: Targets) -> list[Item]:
        """The items with this call's parameters and targets; read where it is the first."""
        planned, tensors = self._planned, []
        for entry in self._merged:
            format, memory = planned.format(entry, targets), self._memories[entry.name]
            tensor = planned.tensor(entry, settings, format, memory)
            tensors.append(planned.pieces(tensor, self._memories.__getitem__))
        warn(planned.rehearse([each for pieces in tensors for each in pieces], settings))
        if self._held is None:
            self._held = [planned.held(entry) for entry in self._merged]
        self._check_apart(self._held, targets)
        device, items = planned.dicts.device, []
        for entry, held, pieces in zip(self._merged, self._held, tensors, strict=True):
            whole = Whole(entry, planned.method, device, targets, partial(_same, held))
            # They are in memory in any case, so that all items are decided together.
            items += whole.items(pieces, num_bytes=0)
        return items

    def _check_apart(self, inputs: Sequence[Held], targets: Targets) -> None:
        """:raises PymergeError: a tensor of ``out`` is memory that the next merge reads."""
        if targets.given is None:
            return
        taken = sorted(place for held in inputs for place in held.places if place[0] < place[1])
        begins = [begin for begin, _ in taken]
        ends = list(accumulate((end for _, end in taken), max))
        for entry in self._merged:
            for name in (entry.name, *entry.aliases):
                first, last = span_of(targets.given[name])
                before = bisect_left(begins, last)
                if first < last and before and ends[before - 1] > first:
                    raise PymergeError(
                        f"Session.merge: out, tensor {name!r} is the memory of one of the "
                        "session's inputs, which the next merge would read; give a copy of the "
                        "module"
                    )

    def _by_name(self, name: str, value: Any) -> Any:
        """An array [tensors, experts] as a function of the tensor's name."""
        if getattr(value, "ndim", 0) != 2:
            return value
        rows = value.tolist()
        if len(rows) != len(self.names):
            raise RecipeError(
                f"{self._planned.method.spec.name}: {name} has {len(rows)} rows, expected one for "
                f"each of {len(self.names)} merged tensors, in the order of Session.names"
            )
        return lambda tensor: rows[self._places[tensor]]


def _same(held: Held) -> Held:
    return held


def mapped_tensors(folder: str | Path) -> dict[str, Any]:
    """The tensors of a checkpoint, their memory the files'.

    :raises CheckpointError: it is no valid checkpoint.
    :raises PymergeError: it is not stored in plain safetensors files.
    """
    from safetensors import safe_open

    from pymerge.checkpoint import TensorEntry, open_checkpoint

    files: dict[Path, list[str]] = {}
    names: dict[str, str] = {}
    for name, entry in open_checkpoint(str(folder)).tensors.items():
        if type(entry) is not TensorEntry or entry.file.suffix != ".safetensors":
            raise PymergeError(
                f"Session: tensor {name!r} of {folder} is not stored as it is in a safetensors "
                "file; merge the model into one first, or give a state dict"
            )
        files.setdefault(entry.file, []).append(name)
        names[name] = entry.name
    found = {}
    for file, members in files.items():
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(names[name]) for name in members})
    return {name: found[name] for name in names}


def _by_layer(
    names: Sequence[str], weights: Any, outside: Any, prefix: str | None
) -> dict[str, Any]:
    numbered: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                numbered.setdefault(".".join(parts[:place]), set()).add(int(part))
                break
    if prefix is None:
        prefix = max(numbered, key=lambda each: len(numbered[each]), default=None)
    layers = numbered.get(prefix or "", set())
    rows = np.asarray(weights, np.float64).tolist()
    if prefix is None or layers != set(range(len(layers))) or len(rows) != len(layers):
        found = f"{len(layers)} layers" if prefix is not None else "no numbered tensors"
        if layers != set(range(len(layers))):
            found += f" with gaps in their numbers ({', '.join(map(str, sorted(layers)))})"
        raise PymergeError(
            f"Session.by_layer: expected a row of weights for each layer, found {len(rows)} rows "
            f"and {found}{f' of {prefix!r}' if prefix else ''}; name the layers by prefix, or give "
            "merge a mapping from parts of names to weights"
        )
    start = f"{prefix}." if prefix else ""
    found_rows = {
        name: rows[int(name[len(start) :].split(".")[0])]
        for name in names
        if name.startswith(start) and name[len(start) :].split(".")[0].isdecimal()
    }
    rest = [name for name in names if name not in found_rows]
    if rest and outside is None:
        raise PymergeError(
            f"Session.by_layer: {len(rest)} tensors such as {rest[0]!r} are in no layer; give "
            "their weights as outside"
        )
    return {**found_rows, **dict.fromkeys(rest, outside)}
