"""What methods share that give one model for each task instead of one for all.

Their output is the base, one vector and for each task a mask of one bit an element and a number:
the model of task t is ``θ₀ + scaleₜ·maskₜ⊙vector``, which :mod:`pymerge.runtime` puts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.methods.protocol import Beside, Description, Extra, Method

VECTOR = Extra("vector", per_model=False, bits=None)
MASKS = Extra("masks", per_model=True, bits=1)

#: The file that describes the tasks, its version, and what each task's model is.
TASKS_NAME = "tasks.json"
TASKS_FORMAT = 1
FORMULA = "NAME + scale * (NAME.vector where the task's bit of NAME.masks is set, else 0)"


def _content(
    method: Method, models: Sequence[str], tensors: Sequence[Beside], files: Sequence[str]
) -> dict[str, Any]:
    """:raises PymergeError: a task's scale is not finite."""
    scales: dict[str, float] = {}
    if method.scales is not None:
        scales = method.scales([each.tensor for each in tensors], [each.values for each in tensors])
    usual = list(models)
    return {
        "format": TASKS_FORMAT,
        "method": method.spec.name,
        "formula": FORMULA,
        "tasks": [{"name": name, "scale": scales.get(name, 1.0)} for name in usual],
        "files": list(files),
        "rows": {
            each.tensor.name: [usual.index(name) for name in each.tensor.model_names]
            for each in tensors
            if list(each.tensor.model_names) != usual
        },
    }


TASKS = Description(
    TASKS_NAME,
    _content,
    "Tasks",
    "As it loads, this folder is the base model. Beside it lies what makes it the model of one "
    "task: `pymerge materialize FOLDER TASK DEST` writes that as a model of its own, "
    '`pymerge.load_task("FOLDER", TASK)` gives its tensors in Python. The tasks, by number:',
)
