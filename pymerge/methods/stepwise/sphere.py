"""multislerp and karcher, step by step as mergekit takes them.

Both work on whole tensors in the working format; karcher takes its norms in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from pymerge.errors import PymergeError
from pymerge.formats import BF16
from pymerge.methods.protocol import Apply, Cost, Method, Solve, Solving, Tensor
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import by_piece, sum_models
from pymerge.methods.stepwise.whole import chunks, gather, put, whole_cost

if TYPE_CHECKING:
    import torch

#: What torch's inner product of bfloat16 holds (measured with oneDNN on AVX-512).
BF16_PRODUCT = 40 << 20


def multislerp(tensor: Tensor) -> Apply | Solving:
    """The weighted mean of directions in the tangent space at their mean. A single model comes back
    as it is."""
    if tensor.num_models == 1 or not tensor.num_elements:
        return by_piece(tensor, lambda piece: piece.models[0])
    return _multislerp(tensor)


def _multislerp(tensor: Tensor) -> Solving:
    base, models = yield from gather(tensor)
    result = yield Solve(partial(_mean_direction, tensor, base, models))
    return put(tensor, result)


def _mean_direction(
    tensor: Tensor, base: torch.Tensor | None, models: list[torch.Tensor]
) -> torch.Tensor:
    import torch

    if base is not None:
        for model in models:
            model.sub_(base)
    smallest = float(tensor.parameters["eps"])
    weights = torch.tensor(tensor.each("weight"), dtype=models[0].dtype)
    if tensor.parameters["normalize_weights"]:
        weights = weights / weights.sum()
    norms = torch.stack([torch.norm(model, dim=-1, keepdim=True) for model in models])
    lengths = norms + smallest
    mean = _sum(tensor, lambda i, part: models[i][part] / lengths[i], weights)
    length = torch.norm(mean)
    if bool(length < smallest):
        return _line(tensor, models, weights, base)
    mean = mean / length
    units = [model.div_(each) for model, each in zip(models, lengths, strict=True)]
    dots = [(unit * mean).sum(-1, keepdim=True) for unit in units]
    tangent = _sum(tensor, lambda i, part: units[i][part] - dots[i] * mean[part], weights)
    angle = torch.norm(tangent) + smallest
    result: torch.Tensor = mean.mul_(torch.cos(angle)).add_(tangent.mul_(torch.sin(angle) / angle))
    result = result.mul_((norms.squeeze(-1) * weights).sum())
    return result if base is None else result.add_(base)


def _sum(
    tensor: Tensor, term: Callable[[int, slice], torch.Tensor], weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum over models, piece by piece."""
    import torch

    factors = weights.view(-1, 1)
    total = torch.empty(tensor.num_elements, dtype=weights.dtype)
    for part in chunks(tensor):
        stack = torch.stack([term(model, part) for model in range(len(weights))])
        total[part] = sum_models(tensor, stack.mul_(factors))
    return total


def _line(
    tensor: Tensor,
    models: list[torch.Tensor],
    weights: torch.Tensor,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """Two directions that cancel are interpolated."""
    if len(models) != 2:
        raise PymergeError(
            f"multislerp: the weighted directions of tensor {tensor.name!r} cancel, so that they "
            "have no mean direction; change the weights"
        )
    result = models[0] * weights[0] + models[1] * weights[1]
    return result if base is None else result + base


def karcher(tensor: Tensor) -> Apply | Solving:
    """The Riemannian mean of directions, times the mean norm."""
    if tensor.num_models == 1 or not tensor.num_elements:
        return by_piece(tensor, lambda piece: piece.models[0])
    return _karcher(tensor)


def _karcher(tensor: Tensor) -> Solving:
    _, models = yield from gather(tensor)
    return put(tensor, (yield Solve(partial(_riemannian_mean, tensor, models))))


def _norm(x: torch.Tensor) -> torch.Tensor:
    """In float32, a number."""
    import torch

    norm: torch.Tensor = torch.linalg.vector_norm(x.float())
    return norm


def _riemannian_mean(tensor: Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    import torch

    smallest = float(tensor.parameters["tol"])
    share = 1.0 / len(models)
    norms = [_norm(model) for model in models]
    for model, norm in zip(models, norms, strict=True):
        if norm.item() != 0.0:
            model.div_(norm)
    units = [unit for unit, norm in zip(models, norms, strict=True) if norm.item() > smallest]
    if not units:
        return torch.zeros_like(models[0])
    total = sum([share] * len(units))
    alpha = share / total
    mean = torch.zeros_like(units[0])
    for unit in units:
        mean += alpha * unit
    norm = _norm(mean)
    mean = units[0].clone() if norm.item() < smallest else mean.div_(norm)
    for _ in range(int(tensor.parameters["max_iter"])):
        tensor.room.check()
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = torch.clamp(torch.dot(mean, unit), -1.0, 1.0)
            angle = torch.arccos(dot)
            if angle.item() < smallest:
                continue
            tangent += alpha * (angle / torch.sin(angle)) * (unit - dot * mean)
        norm = _norm(tangent)
        if norm.item() < smallest:
            break
        mean = torch.cos(norm) * mean + torch.sin(norm) * (tangent.div_(norm))
        del tangent
        norm = _norm(mean)
        if norm.item() > smallest:
            mean.div_(norm)
    scale = sum(share * norm for norm in norms)
    return scale * mean


def _multislerp_cost(tensor: Tensor) -> Cost:
    if tensor.num_models == 1:
        return whole_cost(tensor, lambda size: 0)
    inputs = tensor.num_models + int(tensor.has_base)
    return whole_cost(tensor, lambda size: (inputs + 2) * size)


def _karcher_cost(tensor: Tensor) -> Cost:
    if tensor.num_models == 1:
        return whole_cost(tensor, lambda size: 0)
    cost = whole_cost(tensor, lambda size: (tensor.num_models + 5) * size)
    product = BF16_PRODUCT if tensor.working is BF16 else 0
    return cost._replace(num_bytes=cost.num_bytes + product)


METHODS: Mapping[str, Method] = {
    "multislerp": form(
        "multislerp",
        multislerp,
        ("weight", "normalize_weights", "eps"),
        looks=lambda tensor: 1,
        cost=_multislerp_cost,
    ),
    "karcher": form(
        "karcher", karcher, ("max_iter", "tol"), looks=lambda tensor: 1, cost=_karcher_cost
    ),
}
