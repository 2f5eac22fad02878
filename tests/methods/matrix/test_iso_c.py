"""Iso-C against its formula by float64 SVD, and where that formula says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peak import PANEL_BYTES, stated_and_measured
from safetensors.numpy import load_file
from singular import NAME, difference, iso_c, low_rank, noise, task_vectors, write_adapters

import pymerge
from pymerge import api

MIB = 1 << 20


def merge(deltas: list[np.ndarray], **parameters: Any) -> np.ndarray:
    base = np.zeros_like(deltas[0])
    return pymerge.merge_tensor("iso_c", base, deltas, **parameters)


@pytest.mark.parametrize("shape", [(96, 96), (60, 150), (150, 60), (33, 200), (140, 200)])
@pytest.mark.parametrize("num", [1, 3, 8])
def test_it_is_the_formula(shape: tuple[int, int], num: int) -> None:
    deltas = task_vectors(*shape, num)
    assert difference(merge(deltas), iso_c(deltas)) < 2e-6


def test_weights_and_lambda() -> None:
    deltas, weights = task_vectors(40, 70, 3), [0.5, -1.3, 2.0]
    found = merge(deltas, weight=weights, lambda_=1.5)
    assert difference(found, 1.5 * iso_c(deltas, weights)) < 2e-6


@pytest.mark.parametrize("rows", [60, 160])
def test_low_rank_is_stable_by_the_cut(rows: int) -> None:
    """The formula itself fills what the sum does not reach with arbitrary directions."""
    exact = low_rank(rows, 2 * rows, 3, 4)
    noise = np.random.default_rng(1).normal(size=(3, rows, 2 * rows))
    near = [x + 1e-14 * np.abs(x).max() * e for x, e in zip(exact, noise, strict=True)]
    official, by_rank = iso_c(exact), iso_c(exact, cut=1e-6)
    assert difference(iso_c(near), official) > 0.3
    assert difference(official, by_rank) > 1
    rounded = [x.astype(np.float32) for x in exact]
    assert difference(merge(rounded), by_rank) < 1e-6
    rank = merge(rounded, mean_over="rank")
    assert difference(rank * 12 / rows, by_rank) < 1e-6


def test_copies_zeros_and_one_model() -> None:
    one, two = task_vectors(30, 40, 2)
    zero = np.zeros_like(one)
    assert (merge([zero, zero]) == 0).all()
    assert (merge([one, -one]) == 0).all()
    assert difference(merge([one, one.copy(), two]), iso_c([one, one, two])) < 1e-6
    assert difference(merge([one]), iso_c([one])) < 1e-6
    assert difference(merge([1e15 * one, 1e15 * two]), 1e15 * iso_c([one, two])) < 1e-6


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("num", [1, 5])
def test_thin(shape: tuple[int, int], num: int) -> None:
    deltas = task_vectors(*shape, num)
    assert difference(merge(deltas), iso_c(deltas)) < 2e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(30, 40), (200, 150)])
def test_not_finite(shape: tuple[int, int], bad: float) -> None:
    one, two = task_vectors(*shape, 2)
    two[3, 4] = bad
    assert np.isnan(merge([one, two])).all()


@pytest.mark.parametrize("shape", [(300, 300), (70, 600)])
def test_same_bytes_whatever_the_threads(shape: tuple[int, int]) -> None:
    deltas = noise(*shape, 3)
    first, *others = (merge(deltas, threads=threads).tobytes() for threads in (1, 2, 5))
    assert [first, first] == others


@pytest.mark.parametrize("shape", [(384, 384), (96, 700), (700, 96)])
@pytest.mark.parametrize("num", [1, 8])
def test_peak(shape: tuple[int, int], num: int) -> None:
    stated, measured = stated_and_measured("iso_c", shape, num)
    assert measured <= stated


@pytest.mark.parametrize("threads", [1, 5])
def test_peak_of_a_large_matrix(threads: int) -> None:
    """The panels of a thread are small beside it, and each pole has its inverse."""
    stated, measured = stated_and_measured("iso_c", (1600, 800), 1, threads=threads)
    panels = threads * PANEL_BYTES * 1600
    assert measured <= stated - panels


def test_adapters_stay_factored(tmp_path: Path) -> None:
    base, deltas, recipe = write_adapters(tmp_path, 70, 130, 3, 4)
    api.merge({"merge_method": "iso_c", **recipe}, tmp_path / "out", memory=600 * MIB)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"]
    expected = iso_c(deltas, cut=1e-6)
    assert np.abs(found - base - expected).max() < 1e-6 * np.abs(expected + base).max()
