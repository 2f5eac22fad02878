"""The arithmetic of statistics whatever the user's model runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Products in full float32, without a graph, and results that outlive inference mode.

    A hook runs within the autocast, inference mode and precision settings of the model's call;
    autocast would round the products to 16 bits, and what is made in inference mode cannot be added
    to afterwards.
    """
    import torch

    precision = torch.get_float32_matmul_precision()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
