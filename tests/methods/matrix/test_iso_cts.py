"""Iso-CTS against its formula by float64 SVD, and where that formula says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peak import stated_and_measured
from safetensors.numpy import load_file
from singular import NAME, difference, iso_cts, low_rank, noise, task_vectors, write_adapters

import pymerge
from pymerge import api
from pymerge.methods.iso_cts import split_of

MIB = 1 << 20


def merge(deltas: list[np.ndarray], **parameters: Any) -> np.ndarray:
    base = np.zeros_like(deltas[0])
    return pymerge.merge_tensor("iso_cts", base, deltas, **parameters)


@pytest.mark.parametrize("shape", [(96, 96), (60, 150), (150, 60), (200, 33)])
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_it_is_the_formula(shape: tuple[int, int], num: int) -> None:
    """Float32 sums the task vectors, and the smallest direction that is kept decides by how much
    the result moves with them: 8e-7 were measured."""
    deltas = task_vectors(*shape, num)
    assert difference(merge(deltas), iso_cts(deltas)) < 2e-6


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.55, 1.0])
def test_fraction(shape: tuple[int, int], fraction: float) -> None:
    deltas = task_vectors(*shape, 4)
    found = merge(deltas, common_space_fraction=fraction)
    assert difference(found, iso_cts(deltas, fraction=fraction)) < 2e-6


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_weights_and_lambda(shape: tuple[int, int]) -> None:
    deltas, weights = task_vectors(*shape, 3), [0.5, -1.3, 2.0]
    found = merge(deltas, weight=weights, lambda_=1.5)
    assert difference(found, 1.5 * iso_cts(deltas, weights)) < 2e-6


def test_split_rounds_halves_to_even() -> None:
    assert split_of(512, 0.8, 8) == (512 - 8 * 13, 13)  # 103 / 8 = 12.875
    assert split_of(20, 0.5, 4) == (12, 2)  # 10 / 4 = 2.5
    assert split_of(28, 0.5, 4) == (12, 4)  # 14 / 4 = 3.5
    assert split_of(10, 0.0, 6) == (4, 1)  # the authors' 12 directions do not exist
    assert split_of(3, 0.8, 8) == (3, 0)


def test_common_alone_is_iso_c() -> None:
    deltas = task_vectors(40, 60, 3)
    one = merge(deltas, common_space_fraction=1.0)
    assert difference(one, pymerge.merge_tensor("iso_c", np.zeros_like(one), deltas)) < 1e-6


@pytest.mark.filterwarnings("ignore:tensor. of 60 singular vectors")
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("rank", [2, 14])
def test_low_rank_is_stable_by_the_cut(shape: tuple[int, int], rank: int) -> None:
    """Rank 2: the sum has fewer directions than are common, and nothing is left of the tasks. Rank
    14: the sum has 56, the common directions are 48."""
    exact = low_rank(*shape, 4, rank)
    noise = np.random.default_rng(1).normal(size=(4, *shape))
    near = [x + 1e-14 * np.abs(x).max() * e for x, e in zip(exact, noise, strict=True)]
    by_rank = iso_cts(exact, cut=1e-6)
    if rank == 2:
        official = iso_cts(exact)
        assert difference(iso_cts(near), official) > 0.3
        assert difference(official, by_rank) > 0.3
    assert difference(iso_cts(near, cut=1e-6), by_rank) < 1e-10
    assert difference(merge([x.astype(np.float32) for x in exact]), by_rank) < 5e-6


def test_mean_over_rank() -> None:
    deltas = [x.astype(np.float32) for x in low_rank(60, 90, 4, 2)]
    full, rank = merge(deltas), merge(deltas, mean_over="rank")
    assert difference(8 * rank, 60 * full) < 1e-6


def test_models_that_are_copies() -> None:
    one, two = task_vectors(60, 90, 2)
    deltas = [one, one.copy(), two]
    with pytest.warns(UserWarning, match="nearly depend"):
        found = merge(deltas, common_space_fraction=0.4)
    assert difference(found, iso_cts(deltas, cut=1e-6, fraction=0.4)) < 2e-6


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_thin(shape: tuple[int, int], num: int) -> None:
    deltas = task_vectors(*shape, num)
    assert difference(merge(deltas), iso_cts(deltas)) < 2e-6


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_zeros_and_one_model(shape: tuple[int, int]) -> None:
    one, two = task_vectors(*shape, 2)
    zero = np.zeros_like(one)
    assert (merge([zero, zero]) == 0).all()
    assert difference(merge([one, zero]), iso_cts([one, zero], cut=1e-6)) < 2e-6
    # The sum vanishes, and what the two have for themselves does, too.
    with pytest.warns(UserWarning, match="nearly depend"):
        assert np.abs(merge([one, -one])).max() < 1e-6 * np.abs(one).max()
    assert difference(merge([1e15 * one, 1e15 * two]), 1e15 * iso_cts([one, two])) < 2e-6


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
@pytest.mark.parametrize("fraction", [0.8, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(shape: tuple[int, int], fraction: float, bad: float) -> None:
    one, two = task_vectors(*shape, 2)
    two[3, 4] = bad
    assert np.isnan(merge([one, two], common_space_fraction=fraction)).all()


@pytest.mark.parametrize("shape", [(300, 300), (70, 600), (600, 70)])
def test_same_bytes_whatever_the_threads(shape: tuple[int, int]) -> None:
    deltas = noise(*shape, 3)
    first, *others = (merge(deltas, threads=threads).tobytes() for threads in (1, 2, 5))
    assert [first, first] == others


@pytest.mark.parametrize("shape", [(384, 384), (96, 700), (700, 96)])
@pytest.mark.parametrize("num", [1, 3, 8])
@pytest.mark.parametrize("fraction", [0.0, 0.8])
def test_peak(shape: tuple[int, int], num: int, fraction: float) -> None:
    stated, measured = stated_and_measured("iso_cts", shape, num, common_space_fraction=fraction)
    assert measured <= stated


@pytest.mark.parametrize("shape", [(70, 130), (130, 70)])
def test_adapters_stay_factored(tmp_path: Path, shape: tuple[int, int]) -> None:
    """In their core space they are merged as their products would be, by their rank."""
    base, deltas, recipe = write_adapters(tmp_path, *shape, 3, 4)
    api.merge({"merge_method": "iso_cts", **recipe}, tmp_path / "out", memory=600 * MIB)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"]
    expected = iso_cts(deltas, cut=1e-6)
    assert np.abs(found - base - expected).max() < 1e-6 * np.abs(expected + base).max()
