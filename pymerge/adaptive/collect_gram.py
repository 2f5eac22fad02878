"""Input Grams of every linear layer, for RegMean."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.adaptive.collector import Collector, linear_input
from pymerge.adaptive.gram_sums import GramSums
from pymerge.adaptive.save import Part, write_statistics
from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymerge.adaptive.gram_sums import Group
    from pymerge.adaptive.layers import LinearWeight


class GramCollector(Collector):
    """Sums xᵀx of the inputs of each linear layer, [columns, columns], lower half in float64.

    The memory is that of the sums: one for all layers that always get the same tensor (query, key
    and value; gate and up), and no activation outlives its call.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        only: Iterable[str] | None = None,
        masks: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        import torch

        super().__init__(model, only, masks)
        self._sums = GramSums(None if device is None else torch.device(device))
        self._whole: set[str] = set()
        self._columns = {each.name: each for each in self._linears}

    @property
    def unmasked(self) -> list[str]:
        """Weights that counted every row of some input although the call had a mask, since the
        input was not laid out as the mask is: a pooled token, tokens routed to an expert."""
        return [name for name in self.linears if name in self._whole]

    @property
    def rows_seen(self) -> dict[str, int]:
        """How many rows each weight's layer has seen; without those it never was called for."""
        seen = {name: group.rows for group in self._sums.groups for name in group.names}
        return {name: seen[name] for name in self.linears if seen.get(name)}

    def gram(self, name: str) -> torch.Tensor:
        """The mean of xᵀx over the rows seen, float64 [columns, columns].

        :raises PymergeError: there is no linear layer of this weight, or it has seen no row.
        """
        for group in self._sums.groups:
            if name in group.names and group.rows:
                return group.total.whole() / group.rows
        raise PymergeError(
            f"collect: expected the weight of a linear layer that has seen rows, found {name!r}; "
            "those are in rows_seen"
        )

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the means as ``pymerge-statistics/gram.safetensors`` beside a checkpoint.

        What is there of another kind stays, what is there of this one is replaced. Weights whose
        layers saw no row have no statistics.

        :returns: the folder ``pymerge-statistics``.
        :raises PymergeError: no layer has seen a row, or one has seen NaN or infinity.
        :raises CheckpointError: the checkpoint in the folder has no such weights.
        :raises StorageError: writing failed.
        """
        groups = [group for group in self._sums.groups if group.rows]
        if not groups:
            raise PymergeError(
                "collect: expected linear layers that have seen inputs, found none; call the model "
                "within the with block"
            )
        order = {name: number for number, name in enumerate(self.linears)}
        groups.sort(key=lambda group: min(order[name] for name in group.names))
        parts, weights = [], {}
        for group in groups:
            members = sorted(group.names, key=order.__getitem__)
            size = group.total.size
            parts.append(Part(members[0], (size * (size + 1) // 2,), _pieces(group, members[0])))
            for name in members:
                entry = {"key": members[0], "columns": size, "rows_seen": group.rows}
                if self._columns[name].transposed:
                    entry["transposed"] = True
                weights[name] = entry
        counts = {part.name: group.rows for part, group in zip(parts, groups, strict=True)}
        weights = {name: weights[name] for name in sorted(weights, key=order.__getitem__)}
        shapes = {each.name: tuple(each.weight.shape) for each in self._linears}
        return write_statistics(
            Path(folder),
            "gram",
            parts,
            lambda: {"weights": weights},
            shapes={name: shapes[name] for name in weights},
            counts=counts,
        )

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super()._after(module, args, output)
        self._sums.finish()

    def _hook(self, linear: LinearWeight, module: nn.Module) -> Any:
        # After the call, so that one that fails does not count.
        def after(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> None:
            x = linear_input(args, kwargs)
            if x is None:
                return
            rows, keep = self._rows, None
            if rows is not None:
                if rows.fits(x):
                    keep = rows.kept(x.device)
                else:
                    self._whole.add(linear.name)
            self._sums.observe(linear.name, x, keep)

        return module.register_forward_hook(after, with_kwargs=True)


def _pieces(group: Group, name: str) -> Any:
    def pieces() -> Any:
        for piece in group.total.packed(group.rows):
            if not piece.isfinite().all():
                raise PymergeError(
                    f"collect: expected finite inputs of the layer of {name!r}, found NaN, "
                    "infinity or values whose squares float32 cannot hold; mask padding, or run "
                    "the model in a wider format"
                )
            yield piece.numpy()

    return pieces
