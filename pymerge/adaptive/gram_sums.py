"""Sums of Gram matrices of layers' inputs; layers that always get the same input share one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pymerge.adaptive.exact import float32_products
from pymerge.adaptive.triangle import Triangle

if TYPE_CHECKING:
    import torch

#: Inputs whose Gram waits for further layers: two, so that a layer between two users of one input
#: (attention and MLP side by side) does not part them.
WAITING = 2


@dataclass(eq=False)
class Group:
    """Layers that got the same inputs so far, and the sum over these."""

    names: set[str]
    total: Triangle
    rows: int


@dataclass(eq=False)
class _Waiting:
    """The Gram of one input tensor, and how often each layer was called with it."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    gram: Triangle
    rows: int
    names: Counter[str] = field(default_factory=Counter)

    def is_of(self, x: torch.Tensor) -> bool:
        return self.tensor() is x and self.version == version_of(x)


def version_of(x: torch.Tensor) -> int:
    """Tells a tensor from itself before a change in place: torch counts these, but for tensors of
    inference mode, which the sum of their bits stands for."""
    import torch

    if not x.is_inference():
        return int(x._version)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.view(bits).sum())


class GramSums:
    """Σ xᵀx by layer, over calls.

    Which layers share an input is not asked of the model but seen: a tensor's Gram is computed when
    the first layer gets it and belongs to all layers that get this very tensor. Layers whose inputs
    were the same in every call are one group with one sum; where they part, so do their sums. Call
    :meth:`finish` between calls of the model: a tensor that comes again may have other real rows.

    :param device: where the sums are kept; None: where the first input is.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._groups: list[Group] = []
        self._group_of: dict[str, Group] = {}
        self._waiting: list[_Waiting] = []

    @property
    def groups(self) -> list[Group]:
        """The groups so far, in the order in which they were first seen."""
        self.finish()
        return list(self._groups)

    def observe(self, name: str, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Layer ``name`` is called with ``x`` [..., columns], of which the rows ``keep`` count."""
        for waiting in [each for each in self._waiting if each.tensor() is None]:
            self._settle(waiting)
        found = next((each for each in self._waiting if each.is_of(x)), None)
        if found is None:
            while len(self._waiting) >= WAITING:
                self._settle(self._waiting[0])
            with float32_products(x.device):
                gram = Triangle(int(x.shape[-1]), x.device)
                rows = gram.add_gram(x.detach().reshape(-1, x.shape[-1]), keep)
            found = _Waiting(weakref.ref(x), version_of(x), gram, rows)
            self._waiting.append(found)
        found.names[name] += 1
        if self._is_complete(found.names):
            self._settle(found)

    def finish(self) -> None:
        """Add what waits."""
        while self._waiting:
            self._settle(self._waiting[0])

    def add(self, names: Mapping[str, int], gram: Triangle, rows: int) -> None:
        """Add ``count`` times a Gram of ``rows`` rows to each layer of ``names``."""
        by_count: dict[tuple[int, int], set[str]] = {}
        for name, count in names.items():
            group = self._group_of.get(name)
            by_count.setdefault((count, id(group) if group else 0), set()).add(name)
        for (count, _), members in by_count.items():
            group = self._part(members, gram)
            group.total.add(gram, count)
            group.rows += count * rows

    def _part(self, members: set[str], gram: Triangle) -> Group:
        """The group that has exactly these members, which are of one group or of none."""
        group = self._group_of.get(next(iter(members)))
        if group is not None and group.names == members:
            return group
        if group is None:
            made = Group(members, Triangle(gram.size, self._device or gram.device), 0)
        else:
            group.names -= members
            made = Group(members, group.total.copy(), group.rows)
        self._groups.append(made)
        self._group_of.update(dict.fromkeys(members, made))
        return made

    def _is_complete(self, names: Counter[str]) -> bool:
        """Whether no layer that could still get the tensor would be in one of its groups."""
        known = [self._group_of[name] for name in names if name in self._group_of]
        expected = {name for group in known for name in group.names}
        return names.keys() == expected and set(names.values()) == {1}

    def _settle(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        with float32_products(waiting.gram.device):
            self.add(waiting.names, waiting.gram, waiting.rows)
