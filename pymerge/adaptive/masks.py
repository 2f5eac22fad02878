"""Which rows of a layer's input are real: padding never counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch


def checked_mask(mask: Any) -> torch.Tensor | None:
    """An attention mask [batch, positions] as booleans, None for none.

    Raises PymergeError for one of another rank: it says who attends to whom, not who is real.
    """
    import torch

    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.is_floating_point():
        found = (
            f"{mask.dtype} {list(mask.shape)}"
            if isinstance(mask, torch.Tensor)
            else type(mask).__name__
        )
        raise PymergeError(
            "collect: expected an attention mask [batch, positions] of booleans or whole numbers, "
            f"1 where a token is real, found {found}; give that of the tokenizer to "
            "collector.mask(), or masks=False to count every row"
        )
    return mask.bool()


class RealRows:
    """The rows that a mask leaves, found once for all layers of a call."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self._kept: dict[torch.device, torch.Tensor] = {}

    def fits(self, x: torch.Tensor) -> bool:
        """Whether ``x`` [..., columns] has one row for each position of the mask."""
        rows = x.shape[:-1]
        return rows == self.mask.shape or (len(rows) == 1 and rows[0] == self.mask.numel())

    def kept(self, device: torch.device) -> torch.Tensor:
        """The numbers of the real rows of a flattened input."""
        if device not in self._kept:
            flat = self.mask.reshape(-1).to(device)
            self._kept[device] = flat.nonzero().reshape(-1)
        return self._kept[device]
