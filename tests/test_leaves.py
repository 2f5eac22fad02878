"""The modules that every room shares: formats, sizes, machine limits, names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import pymerge
from pymerge.errors import PymergeError
from pymerge.formats import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, promote
from pymerge.machine import available_cpus, compute_threads
from pymerge.methods import get_method
from pymerge.names import nearest, shown
from pymerge.sizes import parse_size


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ([BF16, BF16], BF16),
        ([F8_E4M3], F8_E4M3),
        ([F8_E4M3, BF16], BF16),
        ([BF16, F16], F32),
        ([F16, F32], F32),
        ([F32, F64, F16], F64),
        ([F8_E4M3, F8_E5M2], F32),
    ],
    ids=str,
)
def test_promotion_of_formats_does_not_depend_on_their_order(formats, expected):
    for order in itertools.permutations(formats):
        assert promote(iter(order)) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("1.5 kb", 1500), (7, 7), ("0", 0), ("1048576TiB", 1 << 60)],
)
def test_sizes_that_are_read(text, expected):
    assert parse_size(text, "memory") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("99999999999TB", r"memory: '99999999999TB' is too large; .* at most 1,048,576 TiB"),
        ("1" * 400, r"memory: '1111.*\.\.\..*' is too large"),
        (2**60 + 1, "too large"),
        ("much", "memory: 'much' is not a size"),
        (1.5, r"memory: 1\.5 is not a size"),
        (True, "memory: True is not a size"),
    ],
    ids=["unit", "digits", "number", "word", "float", "bool"],
)
def test_sizes_that_are_refused(text, message):
    with pytest.raises(PymergeError, match=message):
        parse_size(text, "memory")


def test_threads_are_bounded(tmp_path):
    assert compute_threads(None) == available_cpus()
    assert [compute_threads(n) for n in (1, 1024, np.int64(3))] == [1, 1024, 3]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path), "parameters": {"weight": 1}}],
    }
    for threads in (0, 1025, 10**9, 1.5, True, "4"):
        with pytest.raises(PymergeError, match=r"threads: .* whole number .* at most 1024"):
            pymerge.plan(recipe, threads=threads)


def test_nearest_ignores_case_and_dashes():
    assert nearest("Task-Arithmetic", ["ties", "task_arithmetic"]) == "task_arithmetic"
    assert nearest("base", ["models", "base_model"]) == "base_model"
    assert nearest("xyz", ["ties", "linear"]) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Task-Arithmetic", r"exist; did you mean 'task_arithmetic'\? methods: arcee_fusion, "),
        ("xyz", "'xyz' does not exist; methods: arcee_fusion, "),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest(name, message):
    with pytest.raises(PymergeError, match=message):
        get_method(name)


def test_shown_is_short():
    assert shown(None) == "nothing"
    assert shown({"a": 1}) == "a mapping"
    assert len(shown("x" * 10_000)) == 60
