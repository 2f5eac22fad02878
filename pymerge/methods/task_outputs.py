"""What methods share that give one model for each task instead of one for all.

Their output is the base, one vector and for each task a mask of one bit an element and a number:
the model of task t is ``θ₀ + scaleₜ·maskₜ⊙vector``, which :mod:`pymerge.runtime` puts together.
"""

from __future__ import annotations

from pymerge.methods.protocol import Extra

VECTOR = Extra("vector", per_model=False, bits=None)
MASKS = Extra("masks", per_model=True, bits=1)

#: The version of the file that describes the tasks, and what each task's model is.
TASKS_FORMAT = 1
FORMULA = "NAME + scale * (NAME.vector where the task's bit of NAME.masks is set, else 0)"
