"""Eight small image classification tasks, made from pictures that ship inside two packages.

Six are views of the scikit-learn digits that no single small network knows by itself; two ask from
which scikit-image picture a patch was cut. All have 8x8 grey images, standardised one by one.
Every task has three disjoint parts: ``train``, ``selection`` (on which anything tuned is tuned)
and ``test`` (which is only ever evaluated). The digit tasks share one split of the 1797 images, so
that no test image was trained on in another view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pymerge.demo.optional import optional

SIDE = 8
NUM_PIXELS = SIDE * SIDE
NUM_TRAIN, NUM_SELECTION = 1100, 347

PATCH_SIDE = 32
#: Grey level range below which a patch shows nothing and is drawn again.
FLAT = 0.02
#: Where train, selection and test columns begin and end, as fractions of a picture's width.
COLUMNS = {"train": (0.0, 0.6), "selection": (0.6, 0.8), "test": (0.8, 1.0)}
PATCHES = {"train": 1100, "selection": 348, "test": 348}
PICTURES = {
    "docs": ("page", "text", "horse", "clock"),
    "mix": ("brick", "page", "retina", "coins"),
}

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images float32 [n, 64] with mean 0 and standard deviation 1 each; labels int64 [n]."""

    images: Array
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int) -> Split:
        """The first ``count`` examples."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """One classification task."""

    name: str
    num_classes: int
    train: Split
    selection: Split
    test: Split


def standardise(images: NDArray[np.floating]) -> Array:
    """Images [n, 8, 8] of any range as float32 [n, 64], each with mean 0 and deviation 1."""
    flat = images.reshape(len(images), NUM_PIXELS).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    deviation = flat.std(axis=1, keepdims=True)
    standard: Array = (flat / np.maximum(deviation, 1e-6)).astype(np.float32)
    return standard


def digit_tasks(seed: int) -> list[Task]:
    """Six views of the handwritten digits, ten classes each."""
    digits = optional("sklearn.datasets").load_digits()
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(digits.target))
    images = digits.images[order] / 16.0
    labels = digits.target[order].astype(np.int64)
    shuffled = rng.permutation(NUM_PIXELS)

    views: dict[str, Callable[[Array], Array]] = {
        "digits": lambda x: x,
        "rot90": lambda x: np.rot90(x, axes=(1, 2)),
        "invert": lambda x: 1.0 - x.transpose(0, 2, 1),
        "v-flip": lambda x: x[:, ::-1, :],
        "h-flip": lambda x: x[:, :, ::-1],
        "jumble": lambda x: x.reshape(-1, NUM_PIXELS)[:, shuffled].reshape(-1, SIDE, SIDE),
    }
    ends = (NUM_TRAIN, NUM_TRAIN + NUM_SELECTION)
    tasks = []
    for name, view in views.items():
        parts = np.split(standardise(np.ascontiguousarray(view(images))), ends)
        splits = [Split(x, y) for x, y in zip(parts, np.split(labels, ends), strict=True)]
        tasks.append(Task(name, 10, *splits))
    return tasks


def grey_picture(name: str) -> NDArray[np.float64]:
    """A scikit-image sample picture as grey levels in [0, 1], [height, width]."""
    picture = np.asarray(getattr(optional("skimage.data"), name)())
    scale = 1.0 if picture.dtype == bool else 255.0
    grey = picture.astype(np.float64) / scale
    return grey.mean(axis=2) if grey.ndim == 3 else grey


def cut_patches(
    picture: NDArray[np.float64], columns: tuple[int, int], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """``count`` patches from columns [first, last), averaged from 32x32 to 8x8: [count, 8, 8]."""
    cell = PATCH_SIDE // SIDE
    patches = np.empty((count, SIDE, SIDE))
    found = 0
    while found < count:
        row = rng.integers(0, picture.shape[0] - PATCH_SIDE + 1)
        column = rng.integers(columns[0], columns[1] - PATCH_SIDE + 1)
        patch = picture[row : row + PATCH_SIDE, column : column + PATCH_SIDE]
        small = patch.reshape(SIDE, cell, SIDE, cell).mean(axis=(1, 3))
        if np.ptp(small) > FLAT:
            patches[found] = small
            found += 1
    return patches


def picture_task(name: str, seed: int) -> Task:
    """From which of four pictures is this patch? The parts use disjoint columns of each."""
    pictures = PICTURES[name]
    splits = {}
    for part, (first, last) in COLUMNS.items():
        rng = np.random.default_rng([seed, 1, *name.encode(), *part.encode()])
        each = PATCHES[part] // len(pictures)
        images, labels = [], []
        for label, picture_name in enumerate(pictures):
            picture = grey_picture(picture_name)
            width = picture.shape[1]
            columns = (int(first * width), int(last * width))
            images.append(cut_patches(picture, columns, each, rng))
            labels.append(np.full(each, label, dtype=np.int64))
        order = rng.permutation(each * len(pictures))
        stacked = standardise(np.concatenate(images))
        splits[part] = Split(stacked[order], np.concatenate(labels)[order])
    return Task(name, len(pictures), **splits)


def make_tasks(seed: int) -> list[Task]:
    """All eight tasks; the same seed gives the same bytes."""
    return [*digit_tasks(seed), *(picture_task(name, seed) for name in PICTURES)]
