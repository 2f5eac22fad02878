"""Hooks on a model while the user runs batches through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.adaptive.layers import chosen_names, find_linears, input_of, positional
from pymerge.adaptive.masks import RealRows, checked_mask
from pymerge.errors import PymergeError

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from torch import nn
    from typing_extensions import Self

    from pymerge.adaptive.layers import LinearWeight


class Collector(ABC):
    """Puts hooks on a model for the length of a ``with`` block, and takes every one off again.

    A collector may be entered again later and goes on where it was.
    """

    def __init__(self, model: nn.Module, only: Iterable[str] | None, masks: bool) -> None:
        self.model = model
        self._masks = masks
        self._handles: list[Any] = []
        self._given: RealRows | None = None
        self._call: RealRows | None = None
        self._mask_place = positional(model.forward, "attention_mask")
        linears = find_linears(model)
        names = chosen_names((name for name, _ in model.named_parameters()), only)
        self._linears: list[LinearWeight] = [each for each in linears if each.name in names]
        self._names = names

    @property
    def linears(self) -> list[str]:
        """Names of the weights of the linear layers that are looked at."""
        return [each.name for each in self._linears]

    def mask(self, attention_mask: torch.Tensor | None) -> None:
        """Say which tokens of the next call of the model are real; it wins over the call's own
        ``attention_mask``.

        :param attention_mask: [batch, positions], 1 where a token is real.
        :raises PymergeError: it is not of that form.
        """
        mask = checked_mask(attention_mask)
        self._given = None if mask is None else RealRows(mask)

    @abstractmethod
    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the statistics beside a checkpoint."""

    @abstractmethod
    def _hook(self, linear: LinearWeight, module: nn.Module) -> Any:
        """Put the hook on one linear layer; returns its handle."""

    def __enter__(self) -> Self:
        if self._handles:
            raise PymergeError(
                "collect: expected a collector outside its with block, found it entered already; "
                "make a second one with pymerge.collect"
            )
        try:
            self._handles.append(
                self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            )
            for linear in self._linears:
                self._handles += [self._hook(linear, module) for module in linear.modules]
            # After those of the layers: the model may be one of them.
            self._handles.append(self.model.register_forward_hook(self._after, always_call=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._given = self._call = None

    @property
    def _rows(self) -> RealRows | None:
        """The real rows of the call that is running."""
        return self._given or self._call

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = None
        if not self._masks or self._given is not None:
            return
        place = self._mask_place
        mask = kwargs.get("attention_mask")
        if mask is None and place is not None and place < len(args):
            mask = args[place]
        checked = checked_mask(mask)
        if checked is None or bool(checked.all()):
            return
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise PymergeError(
                "collect: expected batches without padding for a model with an encoder and a "
                "decoder, found an attention_mask with zeros: it is the encoder's alone, and the "
                "two may be of one shape; batch texts of one length, or give masks=False to count "
                "the padding too"
            )
        self._call = RealRows(checked)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._given = self._call = None


def linear_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a linear layer is called with, None where there is no row in it."""
    x = input_of(args, kwargs)
    return x if x.numel() else None
