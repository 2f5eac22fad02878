"""Training of the demo's models: a base that knows every task a little, and one expert per task.

"Pre-training" is a few full-batch steps on a small part of all tasks together, heads included.
Then the heads are frozen and each expert fine-tunes the encoder on one task. Seeds are fixed, so a
second run on the same machine gives the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from pymerge.demo.data import Split, Task
from pymerge.demo.model import Architecture, ResidualMLP


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained bytes, apart from the code."""

    seed: int = 0
    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 2
    pretrain_fraction: float = 0.08
    pretrain_steps: int = 14
    pretrain_rate: float = 2e-3
    finetune_rate: float = 3e-4
    finetune_epochs: int = 8
    batch: int = 64
    weight_decay: float = 0.05


def tensors(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """The split as torch tensors: images float32 [n, 64], labels int64 [n]."""
    return torch.from_numpy(split.images), torch.from_numpy(split.labels)


def pretrain(tasks: Sequence[Task], settings: Settings) -> ResidualMLP:
    """The base: encoder and heads, trained jointly on the first part of every task."""
    torch.manual_seed(settings.seed)
    model = ResidualMLP(
        Architecture(
            heads={task.name: task.num_classes for task in tasks},
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_layers=settings.num_layers,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.pretrain_rate, weight_decay=settings.weight_decay
    )
    parts = {}
    for task in tasks:
        count = max(1, round(settings.pretrain_fraction * len(task.train)))
        parts[task.name] = tensors(task.train.take(count))
    for _ in range(settings.pretrain_steps):
        optimizer.zero_grad()
        for name, (images, labels) in parts.items():
            loss = cross_entropy(model(images, name), labels)
            torch.autograd.backward(loss)
        optimizer.step()
    return model


def finetune(base: ResidualMLP, task: Task, settings: Settings) -> ResidualMLP:
    """A copy of ``base`` whose encoder was trained on ``task``; the heads stay bit for bit."""
    model = copy.deepcopy(base)
    model.heads.requires_grad_(False)
    images, labels = tensors(task.train)
    num_steps = settings.finetune_epochs * -(-len(labels) // settings.batch)
    optimizer = torch.optim.AdamW(
        model.encoder_parameters(), lr=settings.finetune_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.finetune_epochs):
        for batch in torch.split(torch.randperm(len(labels), generator=order), settings.batch):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch], task.name), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model
