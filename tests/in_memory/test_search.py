"""A random search over experts, each candidate merged into a live network and evaluated."""

from __future__ import annotations

import numpy as np
import torch

import pymerge
from pymerge.demo.data import Split, Task
from pymerge.demo.model import accuracy
from pymerge.demo.train import Settings, finetune, pretrain, tensors

TINY = Settings(hidden_size=16, intermediate_size=24, pretrain_steps=2, finetune_epochs=1)


def random_task(name: str, num_classes: int, seed: int) -> Task:
    rng = np.random.default_rng(seed)

    def split(count: int) -> Split:
        images = rng.normal(size=(count, 64)).astype(np.float32)
        return Split(images, rng.integers(0, num_classes, count))

    return Task(name, num_classes, split(100), split(60), split(20))


def test_each_candidate_is_evaluated_as_it_would_be_by_hand():
    """Weights of one expert alone give that expert; others the sum in float64, rounded."""
    tasks = [random_task("left", 3, 0), random_task("right", 4, 1)]
    base = pretrain(tasks, TINY)
    experts = [finetune(base, task, TINY) for task in tasks]
    live, by_hand = pretrain(tasks, TINY), pretrain(tasks, TINY)

    def scores(model):
        return [accuracy(model, task.name, *tensors(task.selection)) for task in tasks]

    candidates = [[1.0, 0.0], [0.0, 1.0], *np.random.default_rng(0).uniform(size=(8, 2)).tolist()]
    states = [model.state_dict() for model in (base, *experts)]
    with pymerge.Session(base, experts, method="task_arithmetic") as session:
        for weights in candidates:
            session.merge(weights, out=live)
            truth = {name: tensor.double() for name, tensor in states[0].items()}
            for weight, state in zip(weights, states[1:], strict=True):
                for name, tensor in states[0].items():
                    truth[name] = truth[name] + weight * (state[name].double() - tensor.double())
            by_hand.load_state_dict({name: tensor.float() for name, tensor in truth.items()})
            for name, tensor in live.state_dict().items():
                assert torch.allclose(tensor, by_hand.state_dict()[name], rtol=0, atol=1e-6)
            assert scores(live) == scores(by_hand)
        for place, expert in enumerate(experts):
            session.merge(candidates[place], out=live)
            assert scores(live) == scores(expert)
