"""The lower triangle of a symmetric matrix, as sums of products."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

#: Rows of a panel: what is stored above the diagonal is at most half of a panel's square.
PANEL = 512
#: Rows of the inputs that one float32 product sums over; the products are summed in float64.
CHUNK = 1024


class Triangle:
    """A symmetric float64 matrix [size, size] of which only panels of the lower half are kept."""

    def __init__(self, size: int, device: torch.device) -> None:
        import torch

        self.size = size
        self.device = device
        self._panels = [
            torch.zeros(
                min(PANEL, size - first),
                min(first + PANEL, size),
                dtype=torch.float64,
                device=device,
            )
            for first in range(0, size, PANEL)
        ]

    def add_gram(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> int:
        """Add xᵀx of x [rows, size], of any dtype, over the rows whose numbers are in ``keep``.

        Products are float32 of at most 1024 rows, their sums float64. Returns the number of rows.
        """
        num_rows = int(x.shape[0] if keep is None else keep.shape[0])
        for first in range(0, num_rows, CHUNK):
            last = min(first + CHUNK, num_rows)
            chunk = x[first:last] if keep is None else x.index_select(0, keep[first:last])
            chunk = chunk.float()
            for panel in self._panels:
                height, end = panel.shape
                panel.add_(chunk[:, end - height : end].T @ chunk[:, :end])
        return num_rows

    def add(self, other: Triangle, scale: float = 1.0) -> None:
        """Add another of the same size."""
        for mine, panel in zip(self._panels, other._panels, strict=True):
            mine.add_(panel.to(self.device), alpha=scale)

    def copy(self) -> Triangle:
        """One of its own."""
        made = Triangle(self.size, self.device)
        made.add(self)
        return made

    def whole(self) -> torch.Tensor:
        """The full matrix [size, size]."""
        import torch

        full = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for panel in self._panels:
            height, end = panel.shape
            full[end - height : end, :end] = panel
        lower = full.tril_()
        return lower + lower.tril(-1).T

    def packed(self, divisor: float) -> Iterator[torch.Tensor]:
        """The lower triangle divided by a number: float32 pieces on the CPU, row after row."""
        import torch

        for panel in self._panels:
            height, end = panel.shape
            inside = torch.ones(height, end, dtype=torch.bool, device=self.device)
            yield (panel / divisor).float()[inside.tril_(end - height)].cpu()
