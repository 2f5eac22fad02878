"""Where results in memory go: new tensors, or those that the caller has, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pymerge.errors import PymergeError
from pymerge.formats import BY_TORCH_NAME, Format
from pymerge.in_memory.models import Entry, state_dict_of
from pymerge.ops.view import View


class Targets:
    """The tensors that results are written to; new ones where ``out`` is None.

    Tensors of the caller keep their dtype, device and memory; autograd sees that they changed.

    :raises PymergeError: ``out`` lacks a tensor, or has one of another shape or of a dtype that
        kernels do not write, or ties tensors that the inputs do not.
    """

    def __init__(self, out: Any | None, entries: Sequence[Entry], caller: str) -> None:
        self._caller = caller
        self.given: Mapping[str, Any] | None = None
        if out is not None:
            self.given = state_dict_of(out, f"{caller}: out", live=True)
            self._check(entries)
        self.tensors: dict[str, Any] = {}

    def format(self, name: str) -> Format | None:
        """The format that a tensor of the caller asks for, None where there is none."""
        if self.given is None:
            return None
        return BY_TORCH_NAME[str(self.given[name].dtype).removeprefix("torch.")]

    def memory(
        self, entry: Entry, format: Format, device: str, taken: Callable[[Any], bool]
    ) -> Any:
        """A contiguous tensor for a merged one, which :meth:`put` brings to its place where it is
        not there already. ``taken`` tells whether a tensor is the memory of an input."""
        import torch

        target = None if self.given is None else self.given[entry.name].detach()
        direct = target is not None and str(target.device) == device and _is_plain(target)
        if direct and not taken(target):
            return target
        dtype = getattr(torch, str(format.torch_name))
        written = torch.empty(entry.shape, dtype=dtype, device=device)
        settle(device)
        return written

    def copy(self, entry: Entry, tensor: Any) -> None:
        """Give the entry the elements of a tensor of the caller, which stays its own."""
        self.put(entry, tensor.clone() if self.given is None else tensor)

    def put(self, entry: Entry, tensor: Any) -> None:
        """Give the entry, under all its names, the elements of ``tensor``."""
        import torch

        for name in (entry.name, *entry.aliases):
            if self.given is None:
                self.tensors[name] = tensor
                continue
            target = self.given[name]
            with torch.no_grad():
                if not _is_same(target, tensor):
                    target.detach().copy_(tensor.clone() if _share(target, tensor) else tensor)
            _mark_changed(target)

    def _check(self, entries: Sequence[Entry]) -> None:
        owners: dict[Any, str] = {}
        for entry in entries:
            for name in (entry.name, *entry.aliases):
                self._check_one(name, entry)
                target = (self.given or {})[name]
                place = (str(target.device), target.data_ptr())
                if not target.numel() or not entry.merged:
                    continue
                if owners.setdefault(place, entry.name) != entry.name:
                    raise PymergeError(
                        f"{self._caller}: out ties {owners[place]!r} and {name!r}, which the "
                        "inputs do not; untie them, or give inputs that tie them"
                    )

    def _check_one(self, name: str, entry: Entry) -> None:
        where = f"{self._caller}: out, tensor {name!r}"
        target = (self.given or {}).get(name)
        if target is None:
            raise PymergeError(f"{where} is missing; out needs every tensor of the result")
        if not hasattr(target, "data_ptr") or target.device.type == "meta":
            found = type(target).__name__ if not hasattr(target, "data_ptr") else "one on meta"
            raise PymergeError(f"{where}: expected a torch tensor with memory, found {found}")
        if tuple(target.shape) != entry.shape:
            raise PymergeError(
                f"{where} has shape {list(target.shape)}, expected {list(entry.shape)}"
            )
        if any(
            step == 0 < size - 1 for size, step in zip(target.shape, target.stride(), strict=True)
        ):
            raise PymergeError(
                f"{where} is expanded: many of its elements are one in memory; give its clone()"
            )
        dtype = str(target.dtype).removeprefix("torch.")
        if not entry.merged and dtype != entry.dtype:
            raise PymergeError(f"{where} is {dtype}, expected {entry.dtype}: it is copied")
        format = BY_TORCH_NAME.get(dtype)
        if entry.merged and (format is None or not format.writable):
            raise PymergeError(
                f"{where} is {dtype}, which kernels do not write; expected one of "
                f"{', '.join(n for n, f in BY_TORCH_NAME.items() if f.writable)}"
            )


def _is_plain(tensor: Any) -> bool:
    return bool(tensor.is_contiguous()) and not tensor.is_neg()


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tensors of one shape are the same elements of memory in the same order."""
    return bool(
        one.data_ptr() == other.data_ptr()
        and one.device == other.device
        and one.dtype == other.dtype
        and one.stride() == other.stride()
        and one.is_neg() == other.is_neg()
    )


def _share(one: Any, other: Any) -> bool:
    """Whether two tensors may have elements in common."""
    first, second = one.untyped_storage(), other.untyped_storage()
    return bool(first.data_ptr() == second.data_ptr())


def _mark_changed(tensor: Any) -> None:
    """Tell autograd, which does not see what kernels write."""
    import torch

    increment = getattr(torch.autograd.graph, "increment_version", None)
    if increment is not None and not tensor.is_inference():
        increment(tensor)


def settle(device: str) -> None:
    """Wait for what torch has queued on a device: kernels have streams of their own."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def view_of(tensor: Any) -> View:
    """The elements of a contiguous torch tensor of a dtype that kernels read, wherever it is."""
    format = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    if format.code is None:
        raise RuntimeError(f"{format.name} is not computed on")
    return View(int(tensor.data_ptr()), format.code, int(tensor.numel()))
