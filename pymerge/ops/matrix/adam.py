"""Adam on a quadratic given by its Gram matrix: the iterates of WUDI-Merging without its tasks.

The gradient of sum_i w_i ||(theta - tau_i) tau_i^T||_F^2 is 2 (theta C - D) with
C = sum_i w_i tau_i^T tau_i and D = sum_i w_i tau_i (tau_i^T tau_i): a step takes one product,
however many tasks there are. Rows of theta do not meet, so a tile of rows runs through all its
steps while C stays, and Adam's state exists for the tiles in work only.

Numerics class: iterative; the iterates are those of torch.optim.Adam on the tasks up to rounding.

Cheng et al., "Whoever Started the Interference Should End It", arXiv 2503.08099; Kingma and Ba,
"Adam", arXiv 1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pymerge.errors import PymergeError
from pymerge.ops import cpu
from pymerge.ops.matrix import operands
from pymerge.ops.view import view

if TYPE_CHECKING:
    import torch

    from pymerge.ops.workspace import Workspace

#: Rows of a tile on the CPU: BLAS packs C anew at each step, which more rows share, and fewer leave
#: the tile nearer to the core. Measured on two cores: 128 is better at 512 columns, 256 at 1024.
ROWS, ROWS_OF_WIDE = 128, 256
WIDE = 1024


def adam_quadratic(
    theta: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    ws: Workspace,
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.Tensor:
    """theta after ``steps`` steps of Adam with gradient 2 (theta C - D).

    :param theta: [m, n], float32 or float64; it is not changed.
    :param c: [n, n], symmetric, of the same type.
    :param d: [m, n], of the same type.
    :returns: [m, n]; rows that meet a NaN are NaN.
    :raises PymergeError: shapes, types or parameters do not fit.
    """
    import torch

    op = "adam_quadratic"
    n = operands.square(op, "c", c)
    rows = operands.matrix(op, "theta", theta)[0]
    operands.shaped(op, "theta", theta, rows, n)
    operands.shaped(op, "d", d, rows, n)
    operands.alike(op, theta=theta, c=c, d=d)
    lr, eps = operands.at_least_zero(op, "lr", lr), operands.at_least_zero(op, "eps", eps)
    if steps < 0:
        raise PymergeError(f"{op}: steps is {steps}, expected zero or more")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0 <= beta < 1:
            raise PymergeError(f"{op}: {name} is {beta}, expected 0 <= {name} < 1")
    out = theta.clone(memory_format=torch.contiguous_format)

    def tile(part: slice) -> None:
        _descend(out[part], c, d[part], ws, steps, lr, betas, eps)

    size = ROWS_OF_WIDE if n >= WIDE else ROWS
    ws.map(tile, ws.panels(rows, size if ws.on_host else None))
    return out


def _descend(
    theta: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    ws: Workspace,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    import torch

    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    gradient = torch.empty_like(theta)
    update = stepper(theta, first, second, gradient, ws)
    for step in range(1, steps + 1):
        ws.check()
        torch.addmm(d, theta, c, beta=-2, alpha=2, out=gradient)
        update(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, step=step)


def stepper(
    theta: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    gradient: torch.Tensor,
    ws: Workspace,
) -> Callable[..., object]:
    """A step of Adam as a function of ``lr``, ``beta1``, ``beta2``, ``eps`` and ``step`` (from 1):
    it changes theta and both moments where they are. All four are contiguous and of one shape."""
    way = _fused if _can_fuse(theta, ws) else _plain
    return way(theta, first, second, gradient)


def _can_fuse(theta: torch.Tensor, ws: Workspace) -> bool:
    """Whether the op adam_step can take the tile; float64 and devices take torch's own."""
    return ws.on_host and theta.element_size() == 4 and cpu.why_not("adam_step") is None


def _fused(
    theta: torch.Tensor, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor
) -> Callable[..., object]:
    return partial(cpu.adam_step, view(theta), view(first), view(second), view(gradient))


def _plain(
    theta: torch.Tensor, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor
) -> Callable[..., object]:
    """The same step by torch's element-wise functions."""
    import torch

    root = torch.empty_like(theta)

    def update(*, lr: float, beta1: float, beta2: float, eps: float, step: int) -> None:
        # Kingma and Ba, end of section 2: the corrections of the bias moved to the scalars.
        correction = math.sqrt(1 - beta2**step)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.sqrt(second, out=root).add_(eps * correction)
        theta.addcdiv_(first, root, value=-lr * correction / (1 - beta1**step))

    return update
