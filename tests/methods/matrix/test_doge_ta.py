"""DOGE-TA against the authors' loop: autograd, Adam, singular value decompositions."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.engine.journal import Journal
from pymerge.methods import doge_ta as module
from pymerge.methods.key_counts import KeyCounts, rank_of, value_of
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import view
from pymerge.ops.workspace import Workspace

_spec = importlib.util.spec_from_file_location("peak", Path(__file__).with_name("peak.py"))
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for one another in the small products of the authors' loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed: int, *shape: int, size: float = 5e-4) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)


def projection(taus: torch.Tensor, subspace: int) -> torch.Tensor:
    short = min(taus.shape[1:])
    keep = short // len(taus)
    left = [torch.linalg.svd(tau, full_matrices=False)[0][:, :keep] for tau in taus]
    shared = torch.linalg.svd(torch.cat(left, 1), full_matrices=False)[0]
    shared = shared[:, : int(short / subspace)]
    return shared @ shared.T


def correction(
    taus: torch.Tensor, lamdas: torch.Tensor, project: torch.Tensor, steps: int, lr: float
) -> torch.Tensor:
    """The loss as the authors write it, its gradient by autograd, their optimizer."""
    delta = torch.nn.Parameter(torch.zeros_like(taus[0]))
    optimizer = torch.optim.Adam([delta], lr=lr)
    scaled = (taus * lamdas.view(-1, 1, 1)).sum(0)
    with torch.enable_grad():
        for _ in range(steps):
            moved = (delta.unsqueeze(0) * lamdas.view(-1, 1, 1)).sum(0)
            terms = [(tau * tau - tau * scaled - tau * moved).sum(1).square() for tau in taus]
            torch.stack(terms).sum().backward()
            delta.grad -= project @ delta.grad
            optimizer.step()
            optimizer.zero_grad()
    return delta.detach()


def thresholds(taus: list[np.ndarray], density: float) -> list[float]:
    """Of each model over all its matrices, by sorting."""
    found = []
    for flat in taus:
        ascending = np.sort(np.abs(flat))
        place = len(flat) - int(len(flat) * density) - 1
        found.append(float(ascending[place]) if place >= 0 else 0.0)
    return found


def merged(
    taus: torch.Tensor, limits: list[float], steps: int = 400, lr: float = 1e-4, subspace: int = 6
) -> np.ndarray:
    """The task vector that the authors' code makes of one matrix."""
    lamdas = torch.stack([0.07 / tau.norm() for tau in taus])
    delta = correction(taus, lamdas, projection(taus, subspace), steps, lr)
    total = sum(
        lamda * (tau + delta) * (tau.abs() >= limit)
        for lamda, tau, limit in zip(lamdas, taus, limits, strict=True)
    )
    return total.double().numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "num"), [(48, 70, 4), (70, 48, 3), (33, 33, 8)])
def test_it_makes_the_official_iterates(
    rows: int, columns: int, num: int, dtype: torch.dtype
) -> None:
    """The descent alone, given the projection: within 1e-5 of the authors' loop."""
    taus = torch.from_numpy(draw(1, num, rows, columns))
    lamdas = torch.stack([0.07 / tau.norm() for tau in taus])
    with Workspace(2) as ws, ws.active():
        stacked = taus.transpose(0, 1).contiguous()
        basis = module.shared_directions(stacked, range(num), 6.0, ws)
        assert basis is not None
        exact = projection(taus.double(), 6)
        assert float((basis.T.double() @ basis.double() - exact).norm()) < 1e-5
        found = module.Descent(stacked, lamdas.tolist(), basis, ws).run(400, 1e-4)
    expected = correction(taus.to(dtype), lamdas.to(dtype), exact.to(dtype), 400, 1e-4)
    assert distance(found.double().numpy(), expected.double().numpy()) < 1e-5


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (60, 40)])
def test_it_is_the_official_merge(rows: int, columns: int, density: float) -> None:
    taus = [draw(10 + i, rows, columns) for i in range(4)]
    base = np.zeros((rows, columns), np.float32)
    found = pymerge.merge_tensor("doge_ta", base, taus, density=density, steps=100)
    if density == 0:
        assert (found == 0).all()
        return
    exact = torch.from_numpy(np.stack(taus)).double()
    limits = thresholds([tau.ravel() for tau in taus], density)
    assert distance(found, merged(exact, limits, steps=100)) < 1e-5


def test_ties_are_all_kept_and_scopes_agree_on_one_tensor() -> None:
    taus = [np.round(draw(20 + i, 30, 44, size=3)) * np.float32(2**-10) for i in range(3)]
    base = np.zeros((30, 44), np.float32)
    found = pymerge.merge_tensor("doge_ta", base, taus, steps=20)
    exact = torch.from_numpy(np.stack(taus)).double()
    expected = merged(exact, thresholds([tau.ravel() for tau in taus], 0.3), steps=20)
    assert distance(found, expected) < 1e-5
    alone = pymerge.merge_tensor("doge_ta", base, taus, steps=20, scope="tensor")
    assert (alone == found).all()


@pytest.mark.parametrize("rank", [1, 2, 500, 999, 1000])
def test_keys_are_those_of_sorting(rank: int) -> None:
    """Several matrices, in pieces, with NaN among them."""
    values = [draw(30 + i, 500, size=10.0**i) for i in range(2)]
    values[0][3] = np.nan
    counts = KeyCounts(1)
    ops = choose_ops(["magnitude_histogram"])
    for _ in range(2):
        for each in values:
            for part in (each[:123], each[123:]):
                counts.add(counts.count(ops, [(None, [view(part)])]))
        if not counts._keys:
            counts.narrow([rank])
    expected = np.sort(np.abs(np.concatenate(values)))[:999][::-1]
    found = value_of(counts.keys()[0])
    assert found == (expected[rank - 1] if rank < 1000 else 0.0)


def test_rank_is_the_authors() -> None:
    assert [rank_of(share, 10) for share in (0.0, 0.05, 0.3, 1.0)] == [0, 1, 4, 11]


def test_a_stack_of_experts_and_a_turned_matrix() -> None:
    taus = [draw(40 + i, 2, 24, 36) for i in range(3)]
    base = np.zeros((2, 24, 36), np.float32)
    found = pymerge.merge_tensor("doge_ta", base, taus, steps=30)
    limits = thresholds([tau.ravel() for tau in taus], 0.3)
    for expert in range(2):
        exact = torch.from_numpy(np.stack([tau[expert] for tau in taus])).double()
        assert distance(found[expert], merged(exact, limits, steps=30)) < 1e-5
    turned = [np.ascontiguousarray(tau[0].T) for tau in taus]
    found = pymerge.merge_tensor(
        "doge_ta", np.zeros((36, 24), np.float32), turned, steps=30, transpose="tensor"
    )
    limits = thresholds([tau[0].ravel() for tau in taus], 0.3)
    exact = torch.from_numpy(np.stack([tau[0] for tau in taus])).double()
    assert distance(found.T, merged(exact, limits, steps=30)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 5), (1, 1)])
@pytest.mark.parametrize("num", [1, 2, 7])
def test_small_and_many(shape: tuple[int, int], num: int) -> None:
    """More models than rows: nothing is projected, and the loop is the authors' without P."""
    taus = [draw(50 + i, *shape) for i in range(num)]
    found = pymerge.merge_tensor(
        "doge_ta", np.zeros(shape, np.float32), taus, steps=50, density=1.0
    )
    exact = torch.from_numpy(np.stack(taus)).double()
    lamdas = torch.stack([0.07 / tau.norm() for tau in exact])
    none = torch.zeros(shape[0], shape[0], dtype=torch.float64)
    assert int(min(shape) / 6) == 0
    delta = correction(exact, lamdas, none, 50, 1e-4)
    expected = sum(w * (tau + delta) for w, tau in zip(lamdas, exact, strict=True)).numpy()
    terms = sum(w * (tau.abs() + delta.abs()) for w, tau in zip(lamdas, exact, strict=True))
    assert np.abs(found - expected).max() < 1e-6 * float(terms.max())


def test_task_vectors_of_zeros_and_copies() -> None:
    base, tau = draw(60, 30, 40, size=0.02), draw(61, 30, 40)
    zeros = pymerge.merge_tensor("doge_ta", base, [base, base])
    assert (zeros == base).all()
    nothing = np.zeros_like(tau)
    both = pymerge.merge_tensor("doge_ta", nothing, [tau, nothing], steps=50)
    alone = pymerge.merge_tensor("doge_ta", nothing, [tau], steps=50)
    assert distance(both, alone) < 1e-6
    copies = pymerge.merge_tensor("doge_ta", nothing, [tau] * 4, steps=50)
    assert np.isfinite(copies).all()


def test_with_one_model_its_largest_directions_are_left_alone() -> None:
    """Where U is arbitrary it is the task vector's own: without a mask the result keeps its size
    along U up to what Adam leaks, so the correction is smaller there than elsewhere."""
    tau = draw(62, 60, 80)
    found = pymerge.merge_tensor(
        "doge_ta", np.zeros_like(tau), [tau], density=1.0, steps=100
    ).astype(float)
    delta = found * np.linalg.norm(tau.astype(float)) / 0.07 - tau
    left = np.linalg.svd(tau.astype(float))[0]
    inside, outside = (np.linalg.norm(u.T @ delta) for u in (left[:, :10], left[:, 10:20]))
    assert inside < 0.7 * outside


def test_not_finite_is_nan() -> None:
    taus = [draw(70 + i, 20, 30) for i in range(2)]
    taus[1][3, 4] = np.inf
    found = pymerge.merge_tensor("doge_ta", np.zeros((20, 30), np.float32), taus, steps=3)
    assert np.isnan(found).all()


def test_others_stay_at_the_base() -> None:
    base, tau = draw(80, 30), draw(81, 30)
    assert (pymerge.merge_tensor("doge_ta", base, [base + tau]) == base).all()


@pytest.mark.parametrize(
    ("name", "selected"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", True),
        ("vision_model.encoder.layers.0.mlp.fc1.bias", False),
        ("vision_model.encoder.layers.0.layer_norm1.weight", False),
        ("vision_model.embeddings.patch_embedding.weight", False),
        ("visual_projection.weight", False),
    ],
)
def test_the_official_layers(name: str, selected: bool) -> None:
    pattern = str(module.PRESETS["official"]["layers"])
    assert (re.search(pattern, name) is not None) == selected


def test_same_bytes_with_any_threads() -> None:
    base = draw(90, 300, 520, size=0.02)
    models = [base + draw(91 + i, 300, 520) for i in range(3)]
    found = {
        threads: pymerge.merge_tensor("doge_ta", base, models, threads=threads, steps=5).tobytes()
        for threads in (1, 2, 5)
    }
    assert found[1] == found[2] == found[5]


@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("shape", [(512, 768), (1024, 256)])
def test_it_takes_what_it_states(shape: tuple[int, int], num: int) -> None:
    stated, measured = peak.stated_and_measured("doge_ta", shape, num, steps=3)
    assert measured <= stated
    # eigh's own matrices and the panels of the threads are stated and not seen
    assert stated < 5 * measured


def files(folder: Path, num: int) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """A recipe over small models, and their tensors, the base's first."""
    shapes = {
        "encoder.layers.0.a.weight": (24, 40),
        "encoder.layers.0.b.weight": (36, 24),
        "encoder.layers.0.a.bias": (24,),
        "head.weight": (20, 24),
    }
    tensors = []
    for model in range(num + 1):
        values = {
            name: draw(100 + i, *shape, size=0.02) + (model > 0) * draw(200 + 9 * model + i, *shape)
            for i, (name, shape) in enumerate(shapes.items())
        }
        (folder / f"m{model}").mkdir(parents=True)
        save_file(values, folder / f"m{model}" / "model.safetensors", {"format": "pt"})
        (folder / f"m{model}" / "config.json").write_text(json.dumps({"model_type": "clip"}))
        tensors.append(values)
    recipe = {
        "merge_method": "doge_ta",
        "base_model": f"{folder}/m0",
        "models": [{"model": f"{folder}/m{i}"} for i in range(1, num + 1)],
        "parameters": {"preset": "official", "steps": 40},
        "dtype": "float32",
    }
    return recipe, tensors


def test_from_files_over_the_whole_model(tmp_path: Path) -> None:
    recipe, (base, *models) = files(tmp_path, 3)
    api.merge(recipe, tmp_path / "out", memory=600 * MIB)
    found = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in base if "encoder" in name and "weight" in name]
    deltas = [{name: model[name] - base[name] for name in names} for model in models]
    limits = thresholds([np.concatenate([d[n].ravel() for n in names]) for d in deltas], 0.3)
    for name, value in base.items():
        if name not in names:
            assert (found[name] == value).all()
            continue
        exact = torch.from_numpy(np.stack([d[name] for d in deltas])).double()
        # the sum with the base, a few hundredths, was rounded to float32
        expected = merged(exact, limits, steps=40)
        error = np.abs(found[name] - base[name] - expected).max()
        assert error < 1e-8 + 1e-5 * np.abs(expected).max(), name


class Stop(Exception):
    """Ends a merge in the middle."""


def stopped_after(num_tensors: int, plan: Any, out: Path) -> None:
    """Leave a merge behind that has so many tensors in its journal."""
    add, left = Journal.add, [num_tensors]

    def counted(self: Journal, *args: Any) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(Stop):
            api.merge(plan, out)


def test_resume(tmp_path: Path) -> None:
    recipe, _ = files(tmp_path, 2)
    plan = api.plan(recipe, memory=600 * MIB)
    api.merge(plan, tmp_path / "whole")
    stopped_after(2, plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 2
    whole, resumed = (
        (tmp_path / each / "model.safetensors").read_bytes() for each in ("whole", "out")
    )
    assert whole == resumed
