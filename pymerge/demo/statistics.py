"""What the experts see and how much their parameters matter, for the merges that ask for it.

Collected on the images that each expert was fine-tuned on, without their labels, and saved beside
it, as a user would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

import pymerge
from pymerge.demo import checkpoint
from pymerge.demo.data import Task
from pymerge.demo.model import one_thread
from pymerge.demo.train import tensors

Kind = Literal["gram", "fisher"]

#: Images of a task that are shown to its expert, and how many at once.
NUM_IMAGES, BATCH = 1024, 64
#: The encoder: heads are the same in all models.
ENCODER = ("embed.*", "blocks.*")


@one_thread()
def collect(kind: Kind, tasks: Sequence[Task], models: Mapping[str, Path]) -> None:
    """Save the statistics of every expert beside it, where they are not there."""
    for task in tasks:
        folder = models[task.name]
        # The index is written last: data without it is that of a run that was stopped.
        index = folder / "pymerge-statistics" / "statistics.json"
        if not index.exists() or kind not in json.loads(index.read_text()):
            _collect(kind, task, folder)


def _collect(kind: Kind, task: Task, folder: Path) -> None:
    torch.manual_seed(0)
    model = checkpoint.load(folder)
    images, _ = tensors(task.train)
    batches = torch.split(images[:NUM_IMAGES], BATCH)
    if kind == "gram":
        with pymerge.collect(model, kind="gram", only=ENCODER) as grams, torch.no_grad():
            for batch in batches:
                model(batch, task.name)
        grams.save(folder)
        return
    with pymerge.collect(model, kind="fisher") as fisher:
        for batch in batches:
            fisher.backward(model(batch, task.name))
    fisher.save(folder)
