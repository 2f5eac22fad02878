"""slerp and nuslerp, step by step as mergekit takes them.

slerp computes in float32 and measures the tensor by chunks of 2^20 elements, nuslerp rounds every
step to the working format. One angle for the whole tensor; nuslerp may also take one for each
vector along the last or the first dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.methods.protocol import Cost, Method, Solve, Solving, Tensor
from pymerge.methods.stepwise.form import form
from pymerge.methods.stepwise.pieces import Piece, by_piece
from pymerge.methods.stepwise.whole import gather, put, whole_cost

if TYPE_CHECKING:
    import torch

#: mergekit's chunk, and what it compares norms and angles with.
CHUNK = 1 << 20
SMALLEST_NORM, COLLINEAR = 1e-8, 0.9995
SMALLEST_LENGTH, SMALLEST_SINE = 1e-7, 1e-8**2


def slerp(tensor: Tensor) -> Solving:
    """From the base to the model along the arc between them."""
    if not tensor.num_elements:
        return by_piece(tensor, lambda piece: piece.origin)
    base, models = yield from gather(tensor)
    t = float(tensor.parameters["t"])
    factors: tuple[torch.Tensor, torch.Tensor] = yield Solve(
        partial(_coefficients, base, models[0], t)
    )
    first, second = factors
    del base, models

    def run(piece: Piece) -> torch.Tensor:
        ends = piece.origin.float(), piece.models[0].float()
        return (first * ends[0] + second * ends[1]).to(piece.origin.dtype)

    return by_piece(tensor, run)


def _coefficients(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors on both ends, float32 [1]."""
    import torch

    norm_a, norm_b = _norm(a), _norm(b)
    parts = []
    for chunk in _chunks(len(a)):
        units = a[chunk].view(1, -1).float() / norm_a, b[chunk].view(1, -1).float() / norm_b
        parts.append((units[0] * units[1]).sum(dim=1, keepdim=True))
    cosine = torch.stack(parts).sum(dim=0).clamp(-1, 1)
    share = torch.tensor([[t]], dtype=torch.float32)
    is_line = cosine.abs() > COLLINEAR
    angle = torch.acos(torch.where(is_line, 0, cosine))
    sine = torch.sin(angle)
    first = torch.where(is_line, 1 - share, torch.sin((1 - share) * angle) / sine)
    second = torch.where(is_line, share, torch.sin(share * angle) / sine)
    return first.view(1), second.view(1)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The norm of the norms of chunks, float32 [1, 1]; 1 for a vanishing one."""
    import torch

    parts = [
        torch.linalg.vector_norm(x[chunk].view(1, -1).float(), dim=1, keepdim=True)
        for chunk in _chunks(len(x))
    ]
    norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return torch.where(norm > SMALLEST_NORM, norm, 1)


def _chunks(num: int) -> Sequence[slice]:
    return [slice(first, min(first + CHUNK, num)) for first in range(0, num, CHUNK)]


def nuslerp(tensor: Tensor) -> Solving:
    """Between two models, or their task vectors, by their weights."""
    first, second = tensor.each("weight")
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    base, models = yield from gather(tensor)
    if tensor.parameters["nuslerp_flatten"]:
        angle = yield Solve(partial(_flat_angle, base, models))
        del base, models

        def run(piece: Piece) -> torch.Tensor:
            ends = piece.models if piece.base is None else piece.deltas()
            between = _between(ends[0], ends[1], angle, t)
            return between if piece.base is None else piece.base + between

        return by_piece(tensor, run)
    return put(tensor, (yield Solve(partial(_along, tensor, base, models, t))))


def _flat_angle(base: torch.Tensor | None, models: list[torch.Tensor]) -> Any:
    ends = models if base is None else [model.sub_(base) for model in models]
    return _angle(ends[0], ends[1])


def _along(
    tensor: Tensor, base: torch.Tensor | None, models: list[torch.Tensor], t: float
) -> torch.Tensor:
    """Vector by vector, along the last dimension or the first one."""
    ends = models if base is None else [model.sub_(base) for model in models]
    a, b = (end.view(tensor.shape) for end in ends)
    turn = bool(tensor.parameters["nuslerp_row_wise"])
    if turn:
        a, b = a.transpose(0, -1), b.transpose(0, -1)
    result = _between(a, b, _angle(a, b), t)
    if turn:
        result = result.transpose(0, -1)
    flat = result.reshape(-1)
    return flat if base is None else base + flat


def _angle(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The angle between vectors along the last dimension, and which are collinear."""
    import torch

    cosine = torch.sum(_unit(a) * _unit(b), dim=-1, keepdim=True).clamp(-1, 1)
    is_line = (1 - cosine.square()) <= SMALLEST_SINE
    return torch.acos(torch.where(is_line, 0, cosine)), is_line


def _unit(x: torch.Tensor) -> torch.Tensor:
    import torch

    length: torch.Tensor = torch.norm(x, dim=-1, keepdim=True).clamp(min=SMALLEST_LENGTH)
    return x / length


def _between(a: torch.Tensor, b: torch.Tensor, angle: Any, t: float) -> torch.Tensor:
    import torch

    theta, is_line = angle
    arc = torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b
    return torch.where(is_line, (1 - t) * a + t * b, arc / torch.sin(theta))


def _nuslerp_cost(tensor: Tensor) -> Cost:
    inputs = tensor.num_models + int(tensor.has_base)
    if tensor.parameters["nuslerp_flatten"]:
        return whole_cost(tensor, lambda size: (inputs + 3) * size)
    return whole_cost(tensor, lambda size: (inputs + 6) * size)


def _slerp_cost(tensor: Tensor) -> Cost:
    chunk = min(CHUNK, tensor.num_elements) * 4 * 4
    cost = whole_cost(tensor, lambda size: 2 * size)
    return cost._replace(num_bytes=cost.num_bytes + chunk)


METHODS: Mapping[str, Method] = {
    "slerp": form("slerp", slerp, ("t",), looks=lambda tensor: 1, cost=_slerp_cost),
    "nuslerp": form(
        "nuslerp",
        nuslerp,
        ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
        looks=lambda tensor: 1,
        cost=_nuslerp_cost,
    ),
}
