"""The linear layers of a torch module, by their weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError
from pymerge.names import nearest, shown

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LinearWeight:
    """The weight of one or, where they are tied, several linear layers.

    ``name`` is the first that ``named_parameters`` gives it. ``transposed`` says that it is stored
    [inputs, outputs], as transformers' Conv1D does.
    """

    name: str
    weight: torch.Tensor
    modules: tuple[nn.Module, ...]
    transposed: bool

    @property
    def columns(self) -> int:
        """How many inputs the layer has."""
        return int(self.weight.shape[0 if self.transposed else 1])


def find_linears(model: nn.Module) -> list[LinearWeight]:
    """The weights of all linear layers of a module, in the module's order.

    A weight that is also used by something else (an embedding that the output head is tied to)
    is not among them, nor is one that is quantised or computed from others.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    found = []
    for name, parameter in model.named_parameters():
        modules = users[id(parameter)]
        if all(_weight_of(module) is parameter for module in modules):
            layouts = {_is_conv1d(module) for module in modules}
            if len(layouts) == 1:
                found.append(LinearWeight(name, parameter, tuple(modules), layouts.pop()))
    return found


def chosen_names(names: Iterable[str], only: Iterable[str] | None) -> set[str]:
    """The names that one of the patterns ``only`` matches, all of them without any.

    Raises PymergeError for a pattern that matches none.
    """
    known = list(names)
    if only is None:
        return set(known)
    if isinstance(only, str):
        only = [only]
    chosen: set[str] = set()
    for pattern in only:
        matched = {name for name in known if fnmatchcase(name, pattern)}
        if not matched:
            like = nearest(pattern, known)
            hint = f"; is {like!r} meant?" if like else ""
            raise PymergeError(
                f"collect: expected the pattern {shown(pattern)} of only to match a weight, found "
                f"none among {len(known)} weights{hint}"
            )
        chosen |= matched
    return chosen


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of a linear layer among what it was called with."""
    tensor: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


def positional(function: Callable[..., Any], name: str) -> int | None:
    """The place of an argument in a call without keywords, or None where it has none."""
    import inspect

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return names.index(name) if name in names else None


def _weight_of(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, as a plain floating-point matrix."""
    from torch import nn

    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if _is_conv1d(module):
        return weight
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return weight if isinstance(module, nn.Linear) and tuple(weight.shape) == shape else None


def _is_conv1d(module: nn.Module) -> bool:
    # A model that has one has imported it.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)
