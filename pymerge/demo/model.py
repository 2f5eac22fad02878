"""The demo's network: a residual MLP with one encoder for all tasks and a small head per task.

The heads are trained with the base and frozen from then on, so that models fine-tuned from the
same base differ in the encoder only, and merging them merges the encoder (the set-up of the CLIP
experiments in the task arithmetic literature, on a scale that trains in seconds).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; ``heads`` maps a task's name to its number of classes."""

    heads: Mapping[str, int]
    num_pixels: int = 64
    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 2


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.fc1(self.norm(x)))
        update: Tensor = self.fc2(hidden)
        return x + update


class ResidualMLP(nn.Module):
    """Images [n, 64] -> logits of one task [n, classes]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        width = architecture.hidden_size
        self.embed = nn.Linear(architecture.num_pixels, width)
        self.blocks = nn.ModuleList(
            Block(width, architecture.intermediate_size) for _ in range(architecture.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, classes) for name, classes in architecture.heads.items()}
        )

    def encode(self, images: Tensor) -> Tensor:
        """Images [n, 64] -> features [n, hidden]."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)
        return features

    def forward(self, images: Tensor, task: str) -> Tensor:
        logits: Tensor = self.heads[task](self.encode(images))
        return logits

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What fine-tuning changes: everything but the heads."""
        for name, parameter in self.named_parameters():
            if not name.startswith("heads."):
                yield parameter


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: so small a model gains nothing from more, and sums have one
    order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@torch.no_grad()
def accuracy(model: ResidualMLP, task: str, images: Tensor, labels: Tensor) -> float:
    """Fraction of ``labels`` [n] that the model's largest logit for ``images`` [n, 64] hits."""
    hits = int((model(images, task).argmax(dim=1) == labels).sum().item())
    return hits / len(labels)
