"""RegMean++ (arXiv 2508.03121): each layer is fitted on what the merged layers before it produce.

RegMean takes every expert's Grams from that expert's own activations, which the merged model never
has. Here the first blocks are merged first: block by block, every expert's block runs on the hidden
states that the merged prefix makes of that expert's data, its linear layers' input Grams G_k give

    W = W̄ + [(Σ G̃_k + λ I)⁻¹ Σ G̃_k (W_k - W̄)ᵀ]ᵀ,   G̃_k = α G_k + (1-α) diag(G_k),
    λ = ridge · mean diag(Σ G̃_k)

and the hidden states go through the merged block to the next. The solution is the deviation from
the mean W̄, so that where the data says nothing the mean stays. A sum is kept for ΣG_k and one for
the right-hand side, however many experts there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.adaptive.blocks import BlockCall, capture_calls, check_blocks
from pymerge.adaptive.gram_sums import GramSums
from pymerge.adaptive.layers import LinearWeight, find_linears, input_of
from pymerge.adaptive.triangle import Triangle
from pymerge.errors import PymergeError
from pymerge.machine import compute_threads

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymerge.ops.workspace import Workspace


@dataclass(frozen=True)
class MergedLayer:
    """How one weight was solved for: rows seen over all experts, the ridge that was used (that
    asked for, or more where the matrix was singular), and the residual of the system."""

    rows_seen: int
    ridge: float
    residual: float


@dataclass(eq=False)
class _System:
    """Layers with one input: ΣG̃_k, and for each the sum of G̃_k (W_k - W̄)ᵀ."""

    names: set[str]
    left: torch.Tensor
    right: dict[str, torch.Tensor]
    rows: int


def regmean_plus_plus(
    merged: nn.Module,
    experts: Sequence[nn.Module],
    blocks: Sequence[str],
    batches: Sequence[Iterable[Any]],
    *,
    alpha: float = 0.95,
    ridge: float = 1e-4,
    weights: Sequence[float] | None = None,
    threads: int | None = None,
) -> dict[str, MergedLayer]:
    """Merge experts into ``merged`` in place, block after block.

    Linear weights inside the blocks are fitted, every other parameter and buffer is the mean of the
    experts'. The hidden states of all batches are kept between two blocks, and one block's Grams.

    :param merged: a model of the experts' architecture; what its parameters are does not matter.
    :param experts: the models to merge; they are not changed.
    :param blocks: names of the modules that follow each other, in order (``model.layers.0``, …):
        each maps hidden states, its first argument, to hidden states, its result or the first of
        it. Their other arguments are kept from one call of the merged model.
    :param batches: for each expert its data: batches as the model is called, a mapping of keyword
        arguments, a tuple of arguments, or one argument. Where a mapping has an ``attention_mask``
        [batch, positions], padding does not count.
    :param alpha: share of the off-diagonal of each Gram, 0 to 1; 1 is least squares.
    :param ridge: towards the mean of the weights, relative to the mean diagonal.
    :param weights: of the experts, default 1 for each; only their ratios count.
    :param threads: of the solves, default all CPUs available.
    :returns: for each fitted weight how it was solved for.
    :raises PymergeError: models, blocks or batches do not fit together.
    """
    import torch

    from pymerge.ops.workspace import Workspace

    _check_numbers(alpha, ridge)
    shares = _shares(weights, len(experts))
    if len(batches) != len(experts):
        raise PymergeError(
            f"regmean_plus_plus: expected batches for each of {len(experts)} experts, found "
            f"{len(batches)} sets of batches"
        )
    check_blocks(merged, experts, blocks)
    modes = [(model, model.training) for each in (merged, *experts) for model in each.modules()]
    report: dict[str, MergedLayer] = {}
    try:
        for model in (merged, *experts):
            model.eval()
        with torch.no_grad(), Workspace(compute_threads(threads)) as host:
            _average(merged, experts)
            calls = [capture_calls(merged, blocks, data, k) for k, data in enumerate(batches)]
            for number, name in enumerate(blocks):
                block = merged.get_submodule(name)
                parts = [expert.get_submodule(name) for expert in experts]
                means = _means(block, parts)
                systems = _measure(block, parts, means, calls, number, alpha, shares)
                for weight, solved in _solve(block, systems, means, ridge, host).items():
                    report[f"{name}.{weight}"] = solved
                for call in (each for of_expert in calls for each in of_expert):
                    call.hidden = call.run(block, number)
    finally:
        for model, mode in modes:
            model.training = mode
    return report


def _check_numbers(alpha: float, ridge: float) -> None:
    if not 0 <= alpha <= 1:
        raise PymergeError(f"regmean_plus_plus: expected alpha from 0 to 1, found {alpha}")
    if not 0 <= ridge < math.inf:
        raise PymergeError(f"regmean_plus_plus: expected a ridge of 0 or more, found {ridge}")


def _shares(weights: Sequence[float] | None, num: int) -> list[float]:
    """Weights of the experts with mean 1."""
    if num < 1:
        raise PymergeError("regmean_plus_plus: expected at least one expert, found none")
    found = [1.0] * num if weights is None else [float(weight) for weight in weights]
    total = math.fsum(found)
    if len(found) != num or not all(0 <= w < math.inf for w in found) or total == 0:
        raise PymergeError(
            f"regmean_plus_plus: expected {num} weights of 0 or more, not all 0, found {found}"
        )
    return [weight * num / total for weight in found]


def _average(merged: nn.Module, experts: Sequence[nn.Module]) -> None:
    """Every parameter and floating-point buffer becomes the experts' mean, others the first's."""
    import torch

    tables = [{**dict(e.named_parameters()), **dict(e.named_buffers())} for e in experts]
    for name, target in [*merged.named_parameters(), *merged.named_buffers()]:
        found = [table[name] for table in tables]
        if not target.is_floating_point():
            target.copy_(found[0])
            continue
        total = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        for tensor in found:
            total += tensor.to(target.device)
        target.copy_(total / len(found))


def _measure(
    block: nn.Module,
    parts: Sequence[nn.Module],
    means: Mapping[str, torch.Tensor],
    calls: Sequence[Sequence[BlockCall]],
    number: int,
    alpha: float,
    shares: Sequence[float],
) -> list[_System]:
    """Run every expert's block on its data and add up the systems of its linear layers."""
    linears = {each.name: each for each in find_linears(block)}
    systems: list[_System] = []
    for share, part, data in zip(shares, parts, calls, strict=True):
        weights = {each.name: each for each in find_linears(part)}
        sums = _grams(part, weights.values(), data, number)
        for group in sums.groups:
            if not group.rows:
                continue
            gram = _shrunk(group.total, alpha, share / group.rows)
            for names in _divide(systems, group.names):
                system = _system(systems, names, linears, gram)
                system.left += gram.to(system.left.device)
                system.rows += group.rows
                for name in names:
                    weight = _matrix(weights[name])
                    delta = weight - means[name].to(weight.device)
                    system.right[name] += (gram @ delta.T).to(system.left.device)
    return systems


def _grams(
    part: nn.Module, linears: Iterable[LinearWeight], data: Sequence[BlockCall], number: int
) -> GramSums:
    sums = GramSums()
    rows = None
    handles = []

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = input_of(args, dict(kwargs))
            if x.numel():
                keep = rows.kept(x.device) if rows is not None and rows.fits(x) else None
                sums.observe(name, x, keep)

        return before

    try:
        for linear in linears:
            for module in linear.modules:
                handles.append(
                    module.register_forward_pre_hook(hook(linear.name), with_kwargs=True)
                )
        for call in data:
            rows = call.real
            call.run(part, number)
            sums.finish()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _shrunk(total: Triangle, alpha: float, scale: float) -> torch.Tensor:
    """scale · (α G + (1-α) diag G), float64."""
    gram = total.whole().mul_(scale)
    diagonal = gram.diagonal().clone()
    gram.mul_(alpha).diagonal().copy_(diagonal)
    return gram


def _divide(systems: list[_System], names: set[str]) -> list[set[str]]:
    """Part systems so that each lies within ``names`` or outside; returns the parts of names."""
    for system in list(systems):
        inside = system.names & names
        if inside and inside != system.names:
            right = {name: system.right.pop(name) for name in inside}
            system.names -= inside
            systems.append(_System(inside, system.left.clone(), right, system.rows))
    parts = [set(system.names) for system in systems if system.names <= names]
    rest = names.difference(*parts)
    return [*parts, rest] if rest else parts


def _system(
    systems: list[_System], names: set[str], linears: Mapping[str, LinearWeight], like: torch.Tensor
) -> _System:
    import torch

    found = next((each for each in systems if each.names == names), None)
    if found is None:
        device = linears[min(names)].weight.device
        shapes = {name: _matrix(linears[name]).shape for name in names}
        right = {
            name: torch.zeros(shape[1], shape[0], dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }
        found = _System(set(names), torch.zeros_like(like, device=device), right, 0)
        systems.append(found)
    return found


def _matrix(linear: LinearWeight) -> torch.Tensor:
    """The weight as float64 [outputs, inputs]."""
    weight = linear.weight.detach().double()
    return weight.T if linear.transposed else weight


def _means(block: nn.Module, parts: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """W̄ [outputs, inputs] of the linear layers in float64; the merged block has them rounded."""
    import torch

    means = {}
    for linear in find_linears(block):
        total = torch.zeros_like(linear.weight, dtype=torch.float64)
        for part in parts:
            total += part.get_parameter(linear.name).to(total.device)
        total /= len(parts)
        means[linear.name] = total.T if linear.transposed else total
    return means


def _solve(
    block: nn.Module,
    systems: Sequence[_System],
    means: Mapping[str, torch.Tensor],
    ridge: float,
    host: Workspace,
) -> dict[str, MergedLayer]:
    """Write the fitted weights into the block."""
    import torch

    from pymerge.ops.matrix.solve import solve_spd
    from pymerge.ops.workspace import Workspace

    solved = {}
    linears = {each.name: each for each in find_linears(block)}
    for system in systems:
        names = [name for name in linears if name in system.names]
        right = torch.cat([system.right[name] for name in names], 1)
        ws = host if right.device.type == "cpu" else Workspace(device=str(right.device))
        with ws.active():
            found = solve_spd(system.left, right, ws, ridge=ridge)
        if not math.isfinite(found.residual):
            raise PymergeError(
                f"regmean_plus_plus: expected finite inputs of the layers {', '.join(names)}, "
                "found NaN or infinity; check the experts and the batches"
            )
        first = 0
        for name in names:
            linear, count = linears[name], system.right[name].shape[1]
            fitted = means[name] + found.x[:, first : first + count].T
            first += count
            linear.weight.copy_(fitted.T if linear.transposed else fitted)
            solved[name] = MergedLayer(system.rows, found.ridge, found.residual)
    return {name: solved[name] for name in linears if name in solved}
