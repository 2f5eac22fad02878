"""TSV-M against its formula by float64 SVD, and where that formula says nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peak import stated_and_measured
from safetensors.numpy import load_file
from singular import NAME, difference, low_rank, noise, task_vectors, tsv_m, write_adapters

import pymerge
from pymerge import api

MIB = 1 << 20


def merge(deltas: list[np.ndarray], **parameters: Any) -> np.ndarray:
    base = np.zeros_like(deltas[0])
    return pymerge.merge_tensor("tsv_m", base, deltas, **parameters)


@pytest.mark.parametrize("shape", [(96, 96), (60, 150), (150, 60), (33, 200)])
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_it_is_the_formula(shape: tuple[int, int], num: int) -> None:
    deltas = task_vectors(*shape, num)
    assert difference(merge(deltas), tsv_m(deltas)) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 1.5, 3.0])
def test_spectra(decay: float) -> None:
    """At decay 3 singular values reach 10⁻⁶ of the largest: what is cut and what is not differ by
    the rounding of float32."""
    deltas = task_vectors(90, 130, 3, decay=decay)
    assert difference(merge(deltas), tsv_m(deltas)) < 1e-6


def test_weights_and_lambda() -> None:
    deltas, weights = task_vectors(40, 70, 3), [0.5, -1.3, 2.0]
    found = merge(deltas, weight=weights, lambda_=0.7)
    assert difference(found, 0.7 * tsv_m(deltas, weights)) < 1e-6
    # A weight of zero is a task vector of zeros, which still takes its share of the directions.
    left_out = merge(deltas, weight=[1.0, 0.0, 1.0])
    zeros = merge([deltas[0], np.zeros_like(deltas[1]), deltas[2]])
    assert (left_out == zeros).all()


def test_k_is_exact() -> None:
    """int(98 * (1 / 49)) is 1 in floating point."""
    assert int(98 * (1 / 49)) == 1
    deltas = task_vectors(98, 98, 49)
    found = np.linalg.svd(merge(deltas), compute_uv=False)
    assert (found > 1e-5 * found[0]).sum() == 98


@pytest.mark.parametrize("rank", [2, 5])
def test_low_rank_is_stable_by_the_cut(rank: int) -> None:
    """Of task vectors whose rank is below k the formula itself takes arbitrary directions: a
    perturbation of 10⁻¹⁴ moves it by more than half. What is merged by the rank moves by the
    rounding of its inputs."""
    exact = low_rank(60, 90, 4, rank)
    noise = np.random.default_rng(1).normal(size=(4, 60, 90))
    near = [x + 1e-14 * np.abs(x).max() * e for x, e in zip(exact, noise, strict=True)]
    official = tsv_m(exact)
    assert difference(tsv_m(near), official) > 0.3
    by_rank = tsv_m(exact, cut=1e-6)
    assert difference(official, by_rank) > 0.3
    assert difference(tsv_m(near, cut=1e-6), by_rank) < 1e-12
    rounded = [x.astype(np.float32) for x in exact]
    assert difference(merge(rounded), by_rank) < 1e-6
    ulps = [np.nextafter(x, np.float32(np.inf)) for x in rounded]
    assert difference(merge(ulps), by_rank) < 1e-6


def test_models_that_are_copies() -> None:
    """Two copies count as one: half of each of their shared directions is either's."""
    one, two = task_vectors(60, 90, 2)
    with pytest.warns(UserWarning, match=r"tensor: of 60 singular vectors .* 20 nearly depend"):
        found = merge([one, one.copy(), two])
    assert difference(found, tsv_m([one, one, two], cut=1e-6)) < 1e-6
    left, values, right = np.linalg.svd(one.astype(float), full_matrices=False)
    with pytest.warns(UserWarning, match="of 60 .* 30 nearly depend"):
        both = merge([one, one.copy()])
    assert difference(both, (left[:, :30] * values[:30]) @ right[:30]) < 1e-6


def test_near_copies_are_warned_of() -> None:
    one, two = task_vectors(60, 90, 2)
    near = one * (1 + np.float32(1e-6))
    near[0, 0] += 1e-6
    with pytest.warns(UserWarning, match="leave out models that are almost copies"):
        found = merge([one, near, two])
    assert np.isfinite(found).all()


@pytest.mark.filterwarnings("error")
def test_other_models_are_not_warned_of() -> None:
    merge(task_vectors(64, 64, 8))
    merge(task_vectors(30, 50, 3, decay=0.0))


def test_more_models_than_rows() -> None:
    deltas = task_vectors(4, 20, 5)
    with pytest.warns(UserWarning, match="5 models share 4 singular values"):
        assert (merge(deltas) == 0).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 3)])
def test_thin(shape: tuple[int, int]) -> None:
    [delta] = task_vectors(*shape, 1)
    assert difference(merge([delta]), delta) < 1e-6


def test_zeros_and_one_model() -> None:
    one, two = task_vectors(30, 40, 2)
    zero = np.zeros_like(one)
    assert (merge([zero, zero]) == 0).all()
    left, values, right = np.linalg.svd(one.astype(float), full_matrices=False)
    half = (left[:, :15] * values[:15]) @ right[:15]
    assert difference(merge([one, zero]), half) < 1e-6
    assert difference(merge([one]), one) < 1e-6
    assert difference(merge([1e15 * one, 1e15 * two]), 1e15 * tsv_m([one, two])) < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float) -> None:
    one, two = task_vectors(30, 40, 2)
    two[3, 4] = bad
    assert np.isnan(merge([one, two])).all()


def test_tensors_that_are_no_matrices() -> None:
    vectors = [np.float32([1, 2]), np.float32([3, 6])]
    base = np.ones(2, np.float32)
    found = pymerge.merge_tensor("tsv_m", base, vectors, lambda_=2.0)
    assert np.allclose(found, base + 2 * (np.mean(vectors, axis=0) - base), rtol=1e-6)


@pytest.mark.parametrize("shape", [(300, 300), (70, 600)])
def test_same_bytes_whatever_the_threads(shape: tuple[int, int]) -> None:
    deltas = noise(*shape, 3)
    first, *others = (merge(deltas, threads=threads).tobytes() for threads in (1, 2, 5))
    assert [first, first] == others


@pytest.mark.parametrize("shape", [(384, 384), (96, 700), (700, 96)])
@pytest.mark.parametrize("num", [1, 3, 8])
def test_peak(shape: tuple[int, int], num: int) -> None:
    stated, measured = stated_and_measured("tsv_m", shape, num)
    assert measured <= stated


def test_adapters_stay_factored(tmp_path: Path) -> None:
    """In their core space they are merged as their products would be, by their rank."""
    base, deltas, recipe = write_adapters(tmp_path, 70, 130, 3, 4)
    api.merge({"merge_method": "tsv_m", **recipe}, tmp_path / "out", memory=600 * MIB)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight"]
    expected = tsv_m(deltas, cut=1e-6)
    assert np.abs(found - base - expected).max() < 1e-6 * np.abs(expected + base).max()


def test_a_warning_of_a_merge_from_files(tmp_path: Path) -> None:
    _, _, recipe = write_adapters(tmp_path, 40, 60, 2, 4)
    for path in (tmp_path / "adapter0").iterdir():
        shutil.copy(path, tmp_path / "adapter1")
    report = api.merge({"merge_method": "tsv_m", **recipe}, tmp_path / "out", memory=600 * MIB)
    [sentence] = [each for each in report.warnings if "nearly depend" in each]
    assert sentence.startswith(f"{NAME}.weight: of 8 singular vectors of different models 4 ")


def test_torch_tensors_of_16_bits() -> None:
    deltas = [torch.from_numpy(x).bfloat16() for x in task_vectors(40, 50, 2)]
    base = torch.zeros(40, 50, dtype=torch.bfloat16)
    found = pymerge.merge_tensor("tsv_m", base, deltas, out_dtype="float32")
    assert difference(found, tsv_m([delta.float().numpy() for delta in deltas])) < 1e-6
