"""State dicts: which tensors there are, what each is merged of, and reading them one by one.

A model is a mapping from names to torch tensors, or a module, whose state dict is taken. A mapping
is asked for each name once to learn shape and type, and again when the tensor is merged, so one
that reads from files keeps nothing in memory. Torch is imported by the caller's tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.errors import PymergeError, RecipeError
from pymerge.formats import BY_TORCH_NAME, Format
from pymerge.methods.spec import MethodSpec
from pymerge.names import nearest
from pymerge.sizes import counted

#: What two names of the same memory have in common.
Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of the result.

    ``aliases`` are further names of the same parameter, tied in every model. ``merged`` says that
    it is a tensor of numbers that the method merges; others are copied from the donor. ``formats``
    are the inputs', the base's first where the method takes one; ``dtype`` is torch's name of the
    donor's.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    merged: bool
    formats: tuple[Format, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class _Seen:
    """What the first look at a tensor told."""

    shape: tuple[int, ...]
    dtype: str
    device: str
    identity: Identity | None
    num_bytes: int


class StateDicts:
    """The state dicts of a call.

    :raises PymergeError: they are no state dicts, or do not fit together.
    :raises RecipeError: the method takes another number of models, or needs a base.
    """

    def __init__(
        self, spec: MethodSpec, base: Any | None, models: Sequence[Any], caller: str
    ) -> None:
        self._caller = caller
        self._lock = threading.Lock()
        if isinstance(models, (str, Mapping)) or not isinstance(models, Sequence):
            raise PymergeError(
                f"{caller}: models is a list of state dicts, found {type(models).__name__}"
            )
        self._check_count(spec, base, len(models))
        self.labels = tuple(f"models[{index}]" for index in range(len(models)))
        self._models = [self._mapping(m, name) for m, name in zip(models, self.labels, strict=True)]
        self._base = None if base is None else self._mapping(base, "base")
        #: Whether the base is one of the inputs of a merge, or only the donor of names.
        self.has_base = self._base is not None and spec.base != "input"
        self.donor = self._models[0] if self._base is None else self._base
        self.donor_label = self.labels[0] if self._base is None else "base"
        self.entries, self.device, self.dropped = self._look()

    @property
    def names(self) -> list[str]:
        """The names of the result, in the donor's order."""
        return list(self.donor)

    @property
    def num_models(self) -> int:
        return len(self._models)

    def read(self, name: str) -> tuple[Any | None, list[Any]]:
        """The base's tensor, where it is an input, and the models', contiguous and plain."""
        with self._lock:
            base = _plain(self._base[name]) if self.has_base and self._base is not None else None
            return base, [_plain(model[name]) for model in self._models]

    def source_of_copy(self, entry: Entry) -> Any:
        """The tensor that is copied: of numbers the first model's, else the donor's."""
        with self._lock:
            model = self._models[0] if entry.merged else self.donor
            return model[entry.name].detach()

    def _check_count(self, spec: MethodSpec, base: Any | None, count: int) -> None:
        if spec.base == "required" and base is None:
            raise RecipeError(f"{spec.name} needs a base, found None")
        if count < spec.min_models or (spec.max_models is not None and count > spec.max_models):
            besides = "" if base is None or spec.base == "input" else " besides the base"
            raise RecipeError(
                f"{spec.name} takes {spec.model_count} models{besides}, found {count}"
            )

    def _mapping(self, model: Any, label: str) -> Mapping[str, Any]:
        return state_dict_of(model, f"{self._caller}: {label}")

    def _look(self) -> tuple[list[Entry], str, list[str]]:
        """Every tensor's shape and type, checked, and what is tied."""
        inputs = dict(zip(self.labels, self._models, strict=True))
        if self.has_base and self._base is not None:
            inputs = {"base": self._base, **inputs}
        first: dict[tuple[Identity, ...], str] = {}
        aliases: dict[str, list[str]] = {}
        found: dict[str, dict[str, _Seen]] = {}
        devices: dict[str, str] = {}
        for name in self.donor:
            donor = self._seen(self.donor[name], name, self.donor_label)
            if not _is_number(donor.dtype):
                found[name] = {self.donor_label: donor}
                continue
            seen = {
                label: donor
                if label == self.donor_label
                else self._seen(self._get(model, name, label), name, label)
                for label, model in inputs.items()
            }
            self._check(name, donor, seen)
            devices.update({each.device: f"{name!r} of {label}" for label, each in seen.items()})
            tied = tuple(each.identity for each in seen.values() if each.identity is not None)
            if tied in first and self._are_tied(first[tied], name, inputs.values()):
                aliases[first[tied]].append(name)
                continue
            if len(tied) == len(seen):
                first[tied] = name
            aliases[name] = []
            found[name] = seen
        if not found:
            raise PymergeError(f"{self._caller}: {self.donor_label} has no tensors")
        if len(devices) > 1:
            places = ", ".join(f"{device} ({tensor})" for device, tensor in devices.items())
            raise PymergeError(
                f"{self._caller}: expected all tensors on one device, found {places}; move them"
            )
        entries = [self._entry(name, seen, aliases) for name, seen in found.items()]
        dropped = dict.fromkeys(n for m in inputs.values() for n in m if n not in self.donor)
        return entries, next(iter(devices), "cpu"), list(dropped)

    def _are_tied(self, one: str, other: str, models: Iterable[Mapping[str, Any]]) -> bool:
        """Whether two names share memory in every model. A mapping that reads from files may have
        put one tensor where the other had been, so both are held here."""
        pairs = [(model[one], model[other]) for model in models]
        return all(_identity(first) == _identity(second) for first, second in pairs)

    def _entry(
        self, name: str, seen: Mapping[str, _Seen], aliases: Mapping[str, Sequence[str]]
    ) -> Entry:
        any_seen = next(iter(seen.values()))
        merged = name in aliases
        formats = tuple(BY_TORCH_NAME[each.dtype] for each in seen.values()) if merged else ()
        return Entry(
            name,
            tuple(aliases.get(name, ())),
            any_seen.shape,
            merged,
            formats,
            seen[self.donor_label].dtype if self.donor_label in seen else any_seen.dtype,
            sum(each.num_bytes for each in seen.values()),
        )

    def _get(self, model: Mapping[str, Any], name: str, label: str) -> Any:
        try:
            return model[name]
        except KeyError:
            near = nearest(name, model)
            hint = f"; its nearest is {near!r}" if near else ""
            raise PymergeError(
                f"{self._caller}: tensor {name!r} is in {self.donor_label} but not in "
                f"{label}{hint}; check that the models are of one architecture"
            ) from None

    def _seen(self, tensor: Any, name: str, label: str) -> _Seen:
        what = f"{self._caller}: tensor {name!r} of {label}"
        if not hasattr(tensor, "data_ptr"):
            raise PymergeError(f"{what}: expected a torch tensor, found {type(tensor).__name__}")
        device = str(tensor.device)
        if tensor.device.type == "meta":
            raise PymergeError(
                f"{what} is on the device meta, where it has no elements; load the model's weights "
                "first"
            )
        if str(tensor.layout) != "torch.strided":
            raise PymergeError(
                f"{what}: expected a dense tensor, found layout "
                f"{str(tensor.layout).removeprefix('torch.')}; pass its to_dense()"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        num_bytes = tensor.numel() * tensor.element_size()
        return _Seen(tuple(tensor.shape), dtype, device, _identity(tensor), num_bytes)

    def _check(self, name: str, donor: _Seen, seen: Mapping[str, _Seen]) -> None:
        for label, each in seen.items():
            where = f"{self._caller}: tensor {name!r} of {label}"
            if each.shape != donor.shape:
                raise PymergeError(
                    f"{where} has shape {list(each.shape)}, expected {list(donor.shape)} as in "
                    f"{self.donor_label}; leave the model out or choose models of one shape"
                )
            if not _is_number(each.dtype):
                raise PymergeError(
                    f"{where} is {each.dtype}, in {self.donor_label} it is {donor.dtype}; floating "
                    "and other types cannot be merged: choose models that store it alike"
                )


def state_dict_of(model: Any, label: str, *, live: bool = False) -> Mapping[str, Any]:
    """A mapping as it is, a module's state dict; with ``live`` of its parameters themselves.

    :raises PymergeError: it is neither.
    """
    if isinstance(model, Mapping):
        return model
    if callable(getattr(model, "state_dict", None)):
        found: Mapping[str, Any] = model.state_dict(keep_vars=live)
        return {name: tensor for name, tensor in found.items() if not name.endswith("_extra_state")}
    raise PymergeError(
        f"{label}: expected a state dict or a torch module, found {type(model).__name__}; for a "
        "checkpoint's folder use pymerge.merge"
    )


def _identity(tensor: Any) -> Identity | None:
    """What another tensor has in common that is the same memory; None without elements."""
    if not tensor.numel():
        return None
    place = (tensor.data_ptr(), str(tensor.device), tensor.dtype)
    return (*place, tuple(tensor.shape), tuple(tensor.stride()))


def _is_number(dtype: str) -> bool:
    format = BY_TORCH_NAME.get(dtype)
    return format is not None and format.is_float


def _plain(tensor: Any) -> Any:
    """The tensor in one piece of memory, without its history."""
    return tensor.detach().resolve_neg().contiguous()


def sentences_of_others(entries: Iterable[Entry], donor: str) -> list[str]:
    """What is copied though it is neither whole numbers nor truth values."""
    found = [e for e in entries if not e.merged and BY_TORCH_NAME.get(e.dtype) is None]
    if not found:
        return []
    dtypes = ", ".join(sorted({entry.dtype for entry in found}))
    return [
        f"{counted(len(found), 'tensor')} of {dtypes}, which no method merges, copied from "
        f"{donor}: {', '.join(entry.name for entry in found[:5])}{', …' if found[5:] else ''}"
    ]


def sentence_of_dropped(names: Iterable[str], donor: str) -> str:
    """What is left out because the donor does not have it."""
    names = list(names)
    first = ", ".join(names[:5])
    return (
        f"{counted(len(names), 'tensor')} of the models not in {donor}, left out: "
        f"{first}{', …' if len(names) > 5 else ''}"
    )
