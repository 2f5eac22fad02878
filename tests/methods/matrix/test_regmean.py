"""RegMean against least squares in float64, in memory and from collected files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.errors import PlanError, PymergeError
from pymerge.methods import regmean as module

_spec = importlib.util.spec_from_file_location("peak", Path(__file__).with_name("peak.py"))
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)

Arrays = list[np.ndarray]


def problem(
    rows: int, columns: int, num: int, samples: int, seed: int = 0
) -> tuple[Arrays, Arrays, Arrays]:
    """Weights near one another, inputs, and the Grams of these."""
    generator = np.random.default_rng(seed)
    base = generator.normal(0, 0.05, (rows, columns))
    weights = [
        (base + 0.01 * generator.normal(size=(rows, columns))).astype(np.float32)
        for _ in range(num)
    ]
    scales = [np.exp(generator.normal(0, 1, columns)) for _ in range(num)]
    inputs = [generator.normal(size=(samples, columns)) * scale for scale in scales]
    return weights, inputs, [x.T @ x / len(x) for x in inputs]


def least_squares(
    weights: Arrays, grams: Arrays, alpha: float, ridge: float, coefficients: Any = None
) -> np.ndarray:
    """The textbook form, W = (sum G)^-1 sum G W, of the ridge towards the mean."""
    scaled = []
    for index, gram in enumerate(grams):
        gram = gram.astype(np.float32).astype(float)
        c = 1.0 if coefficients is None else coefficients[index]
        scaled.append(c * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram))))
    total = sum(scaled)
    shift = ridge * np.diag(total).mean() * np.eye(len(total))
    mean = sum(w.astype(float) for w in weights) / len(weights)
    right = sum(g @ w.astype(float).T for g, w in zip(scaled, weights, strict=True))
    return np.linalg.solve(total + shift, right + shift @ mean.T).T


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(20, 33), (33, 20), (1, 9), (9, 1)])
def test_it_is_least_squares(rows: int, columns: int, alpha: float) -> None:
    weights, _, grams = problem(rows, columns, 3, 200)
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams, alpha=alpha)
    expected = least_squares(weights, grams, alpha, 1e-4)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_float32_for_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_DOUBLE", 8)
    weights, _, grams = problem(40, 60, 4, 500)
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams)
    expected = least_squares(weights, grams, 0.95, 1e-4)
    spread = np.abs(weights[0] - weights[1]).max()
    assert np.abs(found - expected).max() < 1e-4 * spread


def test_each_model_keeps_its_outputs_on_inputs_of_its_own() -> None:
    """Inputs in subspaces that share nothing: least squares serves all of them, the mean none."""
    generator = np.random.default_rng(3)
    basis = np.linalg.qr(generator.normal(size=(24, 24)))[0]
    weights, _, _ = problem(10, 24, 3, 8)
    inputs = [generator.normal(size=(50, 8)) @ basis[:, 8 * k : 8 * k + 8].T for k in range(3)]
    grams = [x.T @ x / len(x) for x in inputs]
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams, alpha=1.0, ridge=1e-9)
    mean = sum(weights) / 3
    for weight, x in zip(weights, inputs, strict=True):
        error, of_mean = (np.linalg.norm(x @ (w - weight).T) for w in (found, mean))
        assert error < 1e-3 * of_mean


def test_inputs_that_were_never_seen_leave_the_mean() -> None:
    weights, inputs, _ = problem(10, 30, 2, 5)
    grams = [x.T @ x / len(x) for x in inputs]
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams, alpha=1.0)
    unseen = np.linalg.svd(np.concatenate(inputs))[2][10:]
    mean = sum(weights) / 2
    spread = np.abs(weights[0] - weights[1]).max()
    assert np.abs((found - mean) @ unseen.T).max() < 1e-4 * spread
    zeros = [np.zeros((30, 30))] * 2
    alone = pymerge.merge_tensor("regmean", None, weights, statistics=zeros)
    assert np.abs(alone - mean).max() < 1e-7


def test_weights_scale_the_grams() -> None:
    weights, _, grams = problem(12, 16, 3, 100)
    given = [0.5, 2.0, 0.0]
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams, weight=given)
    expected = least_squares(weights, grams, 0.95, 1e-4, given)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_equal_grams_give_the_mean_and_one_model_itself() -> None:
    weights, _, grams = problem(12, 16, 3, 100)
    found = pymerge.merge_tensor("regmean", None, weights, statistics=[grams[0]] * 3)
    assert np.abs(found - sum(weights) / 3).max() < 1e-7
    alone = pymerge.merge_tensor("regmean", None, weights[:1], statistics=grams[:1])
    assert (alone == weights[0]).all()


def test_stored_the_other_way_round() -> None:
    weights, _, grams = problem(12, 16, 3, 100)
    turned = [np.ascontiguousarray(weight.T) for weight in weights]
    found = pymerge.merge_tensor("regmean", None, turned, statistics=grams, transpose="tensor")
    assert (pymerge.merge_tensor("regmean", None, weights, statistics=grams) == found.T).all()
    with pytest.raises(PymergeError, match="name it in the parameter transpose"):
        pymerge.merge_tensor("regmean", None, turned, statistics=grams)


def test_threads_do_not_matter() -> None:
    weights, _, grams = problem(300, 520, 3, 600)
    found = {
        pymerge.merge_tensor("regmean", None, weights, statistics=grams, threads=n).tobytes()
        for n in (1, 2, 5)
    }
    assert len(found) == 1


def test_not_finite_is_not_finite() -> None:
    weights, _, grams = problem(6, 8, 2, 50)
    grams[0][2, 3] = grams[0][3, 2] = np.nan
    found = pymerge.merge_tensor("regmean", None, weights, statistics=grams)
    assert np.isnan(found).all()


@pytest.mark.parametrize("shape", [(500, 300), (300, 500), (16, 2048)])
def test_memory_is_what_the_plan_states(shape: tuple[int, int]) -> None:
    weights, _, grams = problem(*shape, 3, 50)
    with peak.watched() as tally:
        pymerge.merge_tensor("regmean", None, weights, statistics=grams, threads=1)
    stated = module._cost(*shape, 3).num_bytes
    assert 0.5 * stated < tally.peak <= stated + peak.PANEL_BYTES * max(shape)


def test_memory_where_float32_does_not_factorise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_DOUBLE", 8)
    weights, _, grams = problem(16, 2048, 2, 50)
    alone = {"alpha": 1.0, "ridge": 1e-9}
    with peak.watched() as tally:
        pymerge.merge_tensor("regmean", None, weights, statistics=grams, threads=1, **alone)
    assert tally.peak <= module._cost(16, 2048, 2).num_bytes + peak.PANEL_BYTES * 2048


def write_model(folder: Path, weight: np.ndarray, norm: np.ndarray, gram: Any) -> Path:
    folder.mkdir()
    tensors = {"layers.0.fc.weight": weight, "layers.0.gate.weight": weight, "norm.weight": norm}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if gram is not None:
        beside = folder / "pymerge-statistics"
        beside.mkdir()
        packed = gram[np.tril_indices(len(gram))].astype(np.float32)
        save_file({"fc.input": packed}, beside / "gram.safetensors")
        said = {"key": "fc.input", "columns": len(gram), "rows_seen": 200}
        names = ("layers.0.fc.weight", "layers.0.gate.weight")
        index = {
            "format": 1,
            "gram": {"file": "gram.safetensors", "weights": dict.fromkeys(names, said)},
        }
        (beside / "statistics.json").write_text(json.dumps(index))
    return folder


def test_from_files(tmp_path: Path) -> None:
    weights, _, grams = problem(30, 44, 3, 200)
    norms = [np.full(44, float(k), np.float32) for k in range(3)]
    models = [write_model(tmp_path / str(k), weights[k], norms[k], grams[k]) for k in range(3)]
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(path)} for path in models],
        "parameters": {"alpha": 0.9},
        "dtype": "float32",
    }
    plan = api.plan(recipe, memory="600MiB")
    api.merge(plan, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = least_squares(weights, grams, 0.9, 1e-4)
    for name in ("layers.0.fc.weight", "layers.0.gate.weight"):
        assert np.abs(found[name] - expected).max() < 1e-6 * np.abs(expected).max()
    assert (found["norm.weight"] == 1).all()
    assert not (tmp_path / "out" / "pymerge-statistics").exists()
    before = plan.hash
    file = models[1] / "pymerge-statistics" / "gram.safetensors"
    packed = load_file(file)
    save_file({key: 2 * value for key, value in packed.items()}, file)
    assert api.plan(recipe, memory="600MiB").hash != before


def test_models_without_statistics_are_named(tmp_path: Path) -> None:
    weights, _, grams = problem(6, 8, 2, 20)
    norm = np.ones(8, np.float32)
    first = write_model(tmp_path / "first", weights[0], norm, grams[0])
    second = write_model(tmp_path / "second", weights[1], norm, None)
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(first)}, {"model": str(second)}],
    }
    with pytest.raises(PlanError, match=r"found none beside .*second; collect them with"):
        api.plan(recipe, memory="600MiB")


def test_no_statistics_in_memory_is_an_error() -> None:
    weights, _, _ = problem(6, 8, 2, 20)
    with pytest.raises(PymergeError, match=r"needs statistics=.*Gram matrix of the inputs; found"):
        pymerge.merge_tensor("regmean", None, weights)


def test_a_matrix_that_is_no_gram_is_named(tmp_path: Path) -> None:
    weights, _, _ = problem(6, 8, 2, 20)
    norm = np.ones(8, np.float32)
    models = [write_model(tmp_path / str(k), weights[k], norm, -np.eye(8)) for k in range(2)]
    recipe = {"merge_method": "regmean", "models": [{"model": str(path)} for path in models]}
    with pytest.raises(PymergeError, match=r"tensor 'layers\.0\.\w+\.weight': solve_spd: expected"):
        api.merge(recipe, tmp_path / "out", memory="600MiB")
