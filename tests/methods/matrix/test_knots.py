"""KnOTS against the singular value decomposition of the concatenation, in float64."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.engine.journal import Journal
from pymerge.errors import RecipeError
from pymerge.methods import knots as module
from pymerge.ops.matrix import spectrum
from pymerge.ops.reference.philox import draws

_spec = importlib.util.spec_from_file_location("peak", Path(__file__).with_name("peak.py"))
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)

MIB = 1 << 20
Arrays = list[np.ndarray]


def draw(seed: int, *shape: int, size: float = 0.01) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)


def low_rank(seed: int, rows: int, columns: int, rank: int) -> np.ndarray:
    product = draw(seed, rows, rank, size=1).astype(float) @ draw(seed + 1, rank, columns, size=1)
    return (0.01 * product).astype(np.float32)


def aligned(taus: Arrays, cut: float = 1e-9) -> tuple[np.ndarray, Arrays]:
    """The basis and the coordinates, as the authors' code finds them."""
    wide = np.concatenate([tau.astype(float) for tau in taus], axis=1)
    left, sigma, right = np.linalg.svd(wide, full_matrices=False)
    keep = sigma > cut * sigma[0]
    scaled = sigma[keep, None] * right[keep]
    return left[:, keep], np.split(scaled, len(taus), axis=1)


def trimmed(flat: np.ndarray, density: float) -> np.ndarray:
    """What reaches the authors' threshold."""
    if density >= 1:
        return flat
    place = len(flat) - int(len(flat) * density) - 1
    return flat * (np.abs(flat) >= np.sort(np.abs(flat))[place])


def elected(flats: np.ndarray, mean: bool) -> np.ndarray:
    """The elements of the sign of the sum, their mean or sum."""
    sign = np.sign(flats.sum(axis=0))
    agree = np.where(flats * sign > 0, flats, 0.0)
    total: np.ndarray = agree.sum(axis=0)
    return total / np.maximum((agree != 0).sum(axis=0), 1) if mean else total


def merged(layers: list[Arrays], density: float, mean: bool = True) -> Arrays:
    """The task vectors that the authors' code makes of some matrices together."""
    bases = [aligned(taus) for taus in layers]
    num = len(layers[0])
    flats = np.stack(
        [trimmed(np.concatenate([z[i].ravel() for _, z in bases]), density) for i in range(num)]
    )
    flat = elected(flats, mean)
    sizes = [z[0].size for _, z in bases]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [u @ part.reshape(z[0].shape) for (u, z), part in zip(bases, parts, strict=True)]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def knots(taus: Arrays, **parameters: Any) -> np.ndarray:
    base = np.zeros(taus[0].shape, np.float32)
    found: np.ndarray = pymerge.merge_tensor("knots", base, taus, **parameters)
    return found


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "num"), [(30, 50, 3), (50, 30, 3), (40, 6, 4), (17, 17, 1)]
)
def test_it_is_the_official_merge(
    rows: int, columns: int, num: int, density: float, merge: str
) -> None:
    taus = [draw(7 * i, rows, columns) for i in range(num)]
    found = knots(taus, density=density, merge=merge)
    (expected,) = merged([taus], density, merge == "mean")
    assert distance(found, expected) < 1e-6
    alone = knots(taus, density=density, merge=merge, scope="tensor")
    assert (alone == found).all()


def test_outputs_are_inputs_of_the_turned() -> None:
    taus = [draw(7 * i, 30, 50) for i in range(3)]
    found = knots(taus, concat="outputs")
    (expected,) = merged([[tau.T for tau in taus]], 0.2)
    assert distance(found.T, expected) < 1e-6
    turned = knots([np.ascontiguousarray(tau.T) for tau in taus], transpose="tensor")
    assert distance(turned.T, merged([taus], 0.2)[0]) < 1e-6


@pytest.mark.parametrize("concat", ["inputs", "outputs"])
def test_low_rank_counts_its_own_directions(concat: str) -> None:
    """Coordinates exist for the rank alone. A product's rounding to float32 is noise of 1e-7 in
    all directions, which the authors' cut of 1e-5 drops."""
    taus = [low_rank(7 * i, 40, 30, 2) for i in range(3)]
    found = knots(taus, concat=concat, cut=1e-5, cut_is="absolute")
    given = taus if concat == "inputs" else [tau.T for tau in taus]
    left, coordinates = aligned(given, cut=1e-5)
    assert left.shape[1] == 6
    flats = np.stack([trimmed(z.ravel(), 0.2) for z in coordinates])
    expected = left @ elected(flats, True).reshape(coordinates[0].shape)
    assert distance(found if concat == "inputs" else found.T, expected) < 1e-5


@pytest.mark.parametrize(
    ("cut", "kind", "kept"),
    [(1e-9, "relative", 3), (1e-5, "relative", 2), (1e-6, "absolute", 3), (1e-2, "absolute", 2)],
)
def test_the_cut_by_its_two_measures(cut: float, kind: str, kept: int) -> None:
    """Of a diagonal with 100, 0.1 and 1e-5."""
    tau = np.diag([100.0, 0.1, 1e-5]).astype(np.float32)
    found = knots([tau], density=1.0, cut=cut, cut_is=kind)
    expected = tau * (np.arange(3) < kept)
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


def test_signs_of_the_basis_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a vote of exactly zero: a task vector and its negative cancel."""
    taus = [draw(0, 24, 36), draw(1, 24, 36)]
    taus.append(-taus[0])
    before = knots(taus)
    exact = spectrum.gram_eigh

    def flipped(g: torch.Tensor, ws: Any) -> Any:
        values, vectors = exact(g, ws)
        signs = torch.tensor([1.0, -1.0, -1.0] * len(g))[: len(g)].double()
        return spectrum.Spectrum(values, vectors * signs)

    monkeypatch.setattr(spectrum, "gram_eigh", flipped)
    after = knots(taus)
    assert distance(after, before) < 1e-7
    monkeypatch.undo()
    assert (knots([taus[0], -taus[0]]) == 0).all()


def test_task_arithmetic_is_the_sum() -> None:
    taus = [draw(7 * i, 20, 30) for i in range(3)]
    found = knots(taus, elementwise="task_arithmetic", weight=[0.5, 1.0, 2.0])
    expected = 0.5 * taus[0] + taus[1] + 2.0 * taus[2].astype(float)
    assert distance(found, expected) < 1e-6


def test_weights_and_lambda() -> None:
    taus = [draw(7 * i, 20, 30) for i in range(2)]
    found = knots(taus, weight=[2.0, 0.0], density=1.0, lambda_=0.5)
    assert distance(found, taus[0]) < 1e-6


def test_dare_draws_by_the_coordinates_index() -> None:
    """Each kept coordinate is one of the exact ones over the density, and as many as expected."""
    tau = draw(3, 60, 80)
    found = knots([tau], elementwise="dare_ties", density=0.3, seed=4).astype(float)
    left, (exact,) = aligned([tau])
    coordinates = left.T @ found * 0.3
    kept = np.abs(coordinates) > 1e-6
    assert np.abs(coordinates - exact)[kept].max() < 1e-6
    assert abs(kept.mean() - 0.3) < 0.03
    seed = module.key(4, "knots", "tensor", 0)
    drawn = draws(seed, np.arange(tau.size)).reshape(tau.shape) < int(0.3 * 2**32)
    assert (drawn == kept).mean() > 0.999
    assert (knots([tau], elementwise="dare_ties", density=0.3, seed=4) == found).all()
    assert (knots([tau], elementwise="dare_ties", density=0.3, seed=5) != found).any()


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 5), (1, 1)])
@pytest.mark.parametrize("num", [1, 2, 7])
def test_small_and_many(shape: tuple[int, int], num: int) -> None:
    taus = [draw(7 * i, *shape) for i in range(num)]
    for scope in ("model", "tensor"):
        found = knots(taus, density=0.5, scope=scope)
        assert distance(found, merged([taus], 0.5)[0]) < 1e-6


def test_zeros_copies_and_not_finite() -> None:
    tau = draw(3, 20, 30)
    assert (knots([np.zeros_like(tau)] * 2) == 0).all()
    assert distance(knots([tau] * 3, density=1.0), tau) < 1e-6
    (expected,) = merged([[tau, np.zeros_like(tau)]], 0.4)
    assert distance(knots([tau, np.zeros_like(tau)], density=0.4), expected) < 1e-6
    assert (knots([tau, tau], density=0.0) == 0).all()
    broken = tau.copy()
    broken[2, 3] = np.nan
    for scope in ("model", "tensor"):
        assert np.isnan(knots([tau, broken], scope=scope)).all()


def test_a_stack_of_experts_is_ranked_together() -> None:
    taus = [draw(7 * i, 2, 20, 30) * np.float32([[[1.0]], [[3.0]]]) for i in range(3)]
    found = knots(taus)
    layers = [[tau[expert] for tau in taus] for expert in range(2)]
    for expert, expected in enumerate(merged(layers, 0.2)):
        assert distance(found[expert], expected) < 1e-6
    alone = knots(taus, scope="tensor")
    assert distance(alone[0], merged(layers[:1], 0.2)[0]) < 1e-6


def test_same_bytes_with_any_threads() -> None:
    taus = [draw(7 * i, 300, 520) for i in range(3)]
    found = {threads: knots(taus, threads=threads).tobytes() for threads in (1, 2, 5)}
    assert found[1] == found[2] == found[5]


@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("shape", [(512, 768), (1024, 256)])
@pytest.mark.parametrize("elementwise", ["ties", "task_arithmetic"])
def test_it_takes_what_it_states(shape: tuple[int, int], num: int, elementwise: str) -> None:
    stated, measured = peak.stated_and_measured("knots", shape, num, elementwise=elementwise)
    assert measured <= stated


SHAPES = {
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
}


def adapters(folder: Path, num: int, rank: int) -> tuple[list[dict[str, str]], list[Any]]:
    """Adapters of one base, and their exact products by name."""
    (folder / "base").mkdir(parents=True)
    base = {f"{name}.weight": draw(50, *shape, size=0.05) for name, shape in SHAPES.items()}
    base["model.norm.weight"] = draw(51, 32)
    save_file(base, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    models, products = [], []
    for number in range(num):
        place = folder / f"adapter{number}"
        place.mkdir()
        keys, exact = {}, {}
        for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
            left = draw(60 + 10 * number + i, rows, rank, size=0.1)
            right = draw(90 + 10 * number + i, rank, columns, size=0.1)
            keys |= {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
            exact[f"{name}.weight"] = 1.5 * left.astype(float) @ right
        save_file(
            {f"base_model.model.{key}": value for key, value in keys.items()},
            place / "adapter_model.safetensors",
        )
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 1.5 * rank,
            "target_modules": ["up_proj", "down_proj"],
        }
        (place / "adapter_config.json").write_text(json.dumps(config))
        models.append({"model": f"{folder}/base+{place}"})
        products.append(exact)
    return models, products


def recipe(folder: Path, models: list[dict[str, str]], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "knots",
        "base_model": str(folder / "base"),
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
    }


@pytest.mark.parametrize("concat", ["inputs", "outputs"])
def test_adapters_over_the_whole_model(tmp_path: Path, concat: str) -> None:
    """From their factors, which have no more directions than their ranks' sum."""
    models, products = adapters(tmp_path, 3, 4)
    out = tmp_path / "out"
    api.merge(recipe(tmp_path, models, concat=concat), out, memory=600 * MIB)
    found = load_file(out / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    names = [f"{name}.weight" for name in SHAPES]
    layers = [[p[name] if concat == "inputs" else p[name].T for p in products] for name in names]
    for name, expected in zip(names, merged(layers, 0.2), strict=True):
        turned = expected if concat == "inputs" else expected.T
        error = np.abs(found[name] - base[name] - turned).max()
        # the sum with the base, below 0.5, was rounded to float32
        assert error < 5e-8, name
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_dense_models_over_the_whole_model(tmp_path: Path) -> None:
    adapters(tmp_path, 2, 3)
    base = load_file(tmp_path / "base" / "model.safetensors")
    dense, deltas = [], []
    for number in range(2):
        tuned = {k: v + draw(300 + 9 * number, *v.shape) for k, v in base.items()}
        place = tmp_path / f"dense{number}"
        place.mkdir()
        save_file(tuned, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text('{"model_type": "llama"}')
        dense.append({"model": str(place)})
        deltas.append({k: v - base[k] for k, v in tuned.items()})
    found = {}
    for threads in (1, 2):
        plan = api.plan(recipe(tmp_path, dense), memory=600 * MIB, threads=threads)
        api.merge(plan, tmp_path / f"out{threads}")
        found[threads] = load_file(tmp_path / f"out{threads}" / "model.safetensors")
    names = [f"{name}.weight" for name in SHAPES]
    layers = [[delta[name] for delta in deltas] for name in names]
    for name, expected in zip(names, merged(layers, 0.2), strict=True):
        assert np.abs(found[1][name] - base[name] - expected).max() < 5e-8
        assert (found[1][name] == found[2][name]).all()
    mean = sum(delta["model.norm.weight"] for delta in deltas) / 2
    assert np.abs(found[1]["model.norm.weight"] - base["model.norm.weight"] - mean).max() < 1e-7


def test_a_model_is_ranked_with_one_density(tmp_path: Path) -> None:
    models, _ = adapters(tmp_path, 2, 3)
    document = recipe(tmp_path, models, density=[0.1, 0.9])
    with pytest.raises(RecipeError, match="density must not vary"):
        api.merge(document, tmp_path / "out", memory=600 * MIB)


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
    models, _ = adapters(tmp_path, 2, 3)
    plan = api.plan(recipe(tmp_path, models), memory=600 * MIB)
    api.merge(plan, tmp_path / "whole")
    stopped_after(1, plan, tmp_path / "out")
    assert api.merge(plan, tmp_path / "out").num_resumed == 1
    whole, resumed = (
        (tmp_path / each / "model.safetensors").read_bytes() for each in ("whole", "out")
    )
    assert whole == resumed
