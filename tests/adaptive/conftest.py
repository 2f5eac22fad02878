"""Small models and the naive statistics of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn


class Attention(nn.Module):
    """Three layers on one input, one on what they make, one on the input again."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.side = nn.Linear(width, 4)

    def forward(self, x, attention_mask=None):
        mixed = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        return self.out(mixed), self.side(x)


@pytest.fixture
def attention():
    torch.manual_seed(3)
    return Attention()


@pytest.fixture
def inputs_of():
    """Record, in float64, the inputs of the layers of a model while it is called."""

    def record(model, names, calls):
        found = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found[name].append(
                    args[0].detach().to(torch.float64).numpy().copy()
                )
            )
            for name in names
        ]
        with torch.no_grad():
            for args in calls:
                model(*args)
        for handle in handles:
            handle.remove()
        return found

    return record


@pytest.fixture
def mean_gram():
    """xᵀx / rows in float64 over a list of inputs, and over the rows of masks where given."""

    def compute(inputs, masks=None):
        flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
        if masks is not None:
            flat = [x[m.reshape(-1).astype(bool)] for x, m in zip(flat, masks, strict=True)]
        rows = np.concatenate(flat).astype(np.float64)
        return rows.T @ rows / len(rows)

    return compute
