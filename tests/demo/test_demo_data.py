"""The demo's tasks: what they hold, that their parts share nothing, that a seed fixes the bytes."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from pymerge.demo import data
from pymerge.demo.optional import optional
from pymerge.errors import PymergeError


@pytest.fixture(scope="module")
def tasks() -> dict[str, data.Task]:
    return {task.name: task for task in data.make_tasks(seed=3)}


def parts(task: data.Task) -> tuple[data.Split, ...]:
    return task.train, task.selection, task.test


def test_images_are_standardised_and_labels_are_classes(tasks: dict[str, data.Task]) -> None:
    assert len(tasks) == 8
    for task in tasks.values():
        for split in parts(task):
            assert split.images.shape == (len(split), 64)
            assert split.images.dtype == np.float32
            assert split.labels.dtype == np.int64
            assert set(split.labels.tolist()) == set(range(task.num_classes)), task.name
            np.testing.assert_allclose(split.images.mean(axis=1), 0, atol=1e-5)
            np.testing.assert_allclose(split.images.std(axis=1), 1, atol=1e-5)


def test_digit_parts_together_are_the_data_set(tasks: dict[str, data.Task]) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = load_digits()
    expected = data.standardise(digits.images)
    found = np.concatenate([split.images for split in parts(tasks["digits"])])
    labels = np.concatenate([split.labels for split in parts(tasks["digits"])])
    assert [len(split) for split in parts(tasks["digits"])] == [1100, 347, 350]
    orders = np.lexsort(expected.T), np.lexsort(found.T)
    np.testing.assert_allclose(found[orders[1]], expected[orders[0]], atol=1e-6)
    np.testing.assert_array_equal(labels[orders[1]], digits.target[orders[0]])


@pytest.mark.parametrize(
    ("name", "undo"),
    [
        ("rot90", lambda x: np.rot90(x, -1, axes=(1, 2))),
        ("invert", lambda x: -x.transpose(0, 2, 1)),
        ("v-flip", lambda x: x[:, ::-1]),
        ("h-flip", lambda x: x[:, :, ::-1]),
    ],
)
def test_views_share_one_split(tasks: dict[str, data.Task], name: str, undo: object) -> None:
    """Undoing the view gives the same images at the same places: no test image of one view was
    trained on in another."""
    for split, original in zip(parts(tasks[name]), parts(tasks["digits"]), strict=True):
        images = undo(split.images.reshape(-1, 8, 8))  # type: ignore[operator]
        np.testing.assert_allclose(images.reshape(-1, 64), original.images, atol=1e-5)
        np.testing.assert_array_equal(split.labels, original.labels)


def test_jumble_moves_pixels_and_changes_none(tasks: dict[str, data.Task]) -> None:
    jumbled, original = tasks["jumble"].test.images, tasks["digits"].test.images
    assert not np.allclose(jumbled, original)
    np.testing.assert_allclose(np.sort(jumbled), np.sort(original), atol=1e-6)


def test_patches_come_from_their_columns_only() -> None:
    """In a picture whose grey level is its column, a patch tells where it was cut."""
    picture = np.tile(np.arange(200.0), (50, 1))
    patches = data.cut_patches(picture, (60, 110), 300, np.random.default_rng(0))
    # A cell averages 4 columns, so the first cell lies 1.5 right of the patch's first column.
    first = patches[:, 0, 0] - 1.5
    last = patches[:, 0, -1] + 1.5
    assert first.min() == 60
    assert last.max() == 109


def test_picture_parts_use_disjoint_columns() -> None:
    spans = sorted(data.COLUMNS.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[0][0] >= 0
    assert spans[-1][1] <= 1


def test_flat_patches_are_left_out() -> None:
    picture = np.zeros((64, 128))
    picture[:, 100:] = 1.0
    patches = data.cut_patches(picture, (0, 128), 50, np.random.default_rng(0))
    assert np.ptp(patches.reshape(50, -1), axis=1).min() > data.FLAT


def test_seed_fixes_the_bytes(tasks: dict[str, data.Task]) -> None:
    again, other = data.make_tasks(seed=3), data.make_tasks(seed=4)
    for task, changed in zip(again, other, strict=True):
        for found, expected in zip(parts(task), parts(tasks[task.name]), strict=True):
            assert found.images.tobytes() == expected.images.tobytes()
            assert found.labels.tobytes() == expected.labels.tobytes()
        assert changed.test.images.tobytes() != task.test.images.tobytes()


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PymergeError, match=f"pip install {package}"):
        optional(module)
