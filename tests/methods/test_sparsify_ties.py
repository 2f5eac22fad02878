"""The options of TIES against transcriptions of the authors' code, of PEFT's and of mergekit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge.methods import trim
from pymerge.plan import memory

SHAPES = {"a.0.w": (50, 40), "a.1.w": (30, 70), "b": (333,), "empty": (0, 4), "scalar": ()}


def flat_models(num: int, size: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Task vectors on a grid of 2⁻¹²: exact, full of equal magnitudes and of votes that cancel."""
    random = np.random.default_rng([seed, num, size])
    base = (random.integers(-60, 60, size) / 4096).astype(np.float32)
    tuned = [(base + random.integers(-9, 10, size) / 4096).astype(np.float32) for _ in range(num)]
    return base, tuned


def official(
    tau: np.ndarray, keep: float, function: str, *, zero: str = "majority", ties: str = "all"
) -> np.ndarray:
    """The authors' merge of ``tau`` [num_models, d]: threshold, election, disjoint merge."""
    d = tau.shape[1]
    trimmed = np.zeros_like(tau)
    for row, kept in zip(tau, trimmed, strict=True):
        if ties == "all":
            mask = np.abs(row) >= np.sort(np.abs(row))[d - int(d * keep) - 1]
        else:
            mask = np.zeros(d, bool)
            mask[np.argsort(-np.abs(row), kind="stable")[: int(d * keep)]] = True
        kept[mask] = row[mask]
    sign = np.sign(trimmed.sum(axis=0))
    if zero == "majority":
        sign[sign == 0] = np.sign(sign.sum())
        agrees = np.where(sign > 0, trimmed > 0, trimmed < 0)
    elif zero == "plus":
        agrees = np.where(sign >= 0, trimmed > 0, trimmed < 0)
    else:
        agrees = np.where(sign > 0, trimmed > 0, (sign < 0) & (trimmed < 0))
    selected = trimmed * agrees
    if function == "count":
        return selected.sum(axis=0) / np.maximum(np.count_nonzero(selected, axis=0), 1)
    if function == "sum":
        return selected.sum(axis=0)
    return np.abs(selected).max(axis=0) * np.where(selected.sum(axis=0) >= 0, 1, -1)


def deltas(base: np.ndarray, tuned: list[np.ndarray]) -> np.ndarray:
    return np.stack([x.astype(np.float64) - base for x in tuned])


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("function", ["count", "sum", "max"])
@pytest.mark.parametrize("zero", ["majority", "plus", "skip"])
@pytest.mark.parametrize("ties", ["all", "index"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_every_switch(num: int, function: str, zero: str, ties: str, scope: str) -> None:
    """One tensor is a model of its own, so both scopes must give the same."""
    base, tuned = flat_models(num, 2003)
    options: dict[str, Any] = {
        "ties": ties, "zero_sign": zero, "merge": function, "trim_scope": scope, "elect": "plain",
    }  # fmt: skip
    if scope == "model" and zero == "majority" and ties == "index":
        with pytest.raises(pymerge.RecipeError, match="needs ties: all"):
            pymerge.merge_tensor("ties", base, tuned, weight=1.0, backend="reference", **options)
        return
    found = pymerge.merge_tensor(
        "ties", base, tuned, weight=1.0, density=0.3, backend="reference", **options
    )
    truth = base + official(deltas(base, tuned), 0.3, function, zero=zero, ties=ties)
    np.testing.assert_allclose(found, truth, rtol=2**-22, atol=2**-26)


def test_the_switches_matter() -> None:
    """The case above is worth its name only if each switch changes the outcome."""
    tau = deltas(*flat_models(4, 2003))
    plain = official(tau, 0.3, "count")
    assert np.any(official(tau, 0.3, "count", zero="skip") != plain)
    assert np.any(official(tau, 0.3, "count", ties="index") != plain)
    swapped = official(-tau, 0.3, "count")
    assert np.any(official(tau, 0.3, "count", zero="plus") != plain) or np.any(
        official(-tau, 0.3, "count", zero="plus") != swapped
    )


@pytest.mark.parametrize("flip", [1, -1])
def test_majority_follows_the_data(flip: int) -> None:
    """Mirrored task vectors give the mirrored merge; plus alone would not."""
    base = np.zeros(3000, np.float32)
    random = np.random.default_rng(5)
    first = random.integers(-3, 9, 3000).astype(np.float32)
    tuned = [flip * first, flip * random.permutation(first), -flip * first]
    found = pymerge.merge_tensor(
        "ties", base, tuned, preset="official", density=0.9, backend="reference"
    )
    truth = official(np.stack(tuned).astype(np.float64), 0.9, "count")
    np.testing.assert_allclose(found, truth, rtol=2**-22)


def peft(tau: np.ndarray, density: float, weights: list[float]) -> np.ndarray:
    trimmed = np.zeros_like(tau)
    for row, kept in zip(tau, trimmed, strict=True):
        chosen = np.argsort(-np.abs(row), kind="stable")[: int(density * row.size)]
        kept[chosen] = row[chosen]
    sign = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(trimmed) == sign
    mixed = (np.float32(weights)[:, None].astype(np.float64) * trimmed * agrees).sum(axis=0)
    return mixed / np.maximum(agrees.sum(axis=0), 1)


def test_preset_peft() -> None:
    base, tuned = flat_models(3, 1999)
    weights = [0.9, 0.1, 0.4]
    found = pymerge.merge_tensor(
        "ties", base, tuned, preset="peft", weight=weights, density=0.4, backend="reference"
    )
    truth = base + peft(deltas(base, tuned), 0.4, weights)
    np.testing.assert_allclose(found, truth, rtol=2**-22, atol=2**-26)


@pytest.mark.parametrize("normalize", [True, False])
def test_rescale_restores_the_magnitude_before_the_vote(normalize: bool) -> None:
    base, tuned = flat_models(3, 3001)
    weights, densities = [0.5, 1.0, 0.75], [0.2, 0.6, 1.0]
    found = pymerge.merge_tensor(
        "ties",
        base,
        tuned,
        weight=weights,
        density=densities,
        normalize=normalize,
        rescale=True,
        backend="reference",
    )
    votes = []
    for tau, weight, density in zip(deltas(base, tuned), weights, densities, strict=True):
        kept = np.zeros_like(tau)
        chosen = np.argsort(-np.abs(tau), kind="stable")[: int(density * tau.size)]
        kept[chosen] = tau[chosen]
        votes.append(weight * kept * np.abs(tau).sum() / np.abs(kept).sum())
    agrees = np.sign(votes) == np.where(np.sum(votes, axis=0) >= 0, 1, -1)
    total = (votes * agrees).sum(axis=0)
    divisor = (np.array(weights)[:, None] * agrees).sum(axis=0)
    truth = base + (total / np.where(divisor == 0, 1, divisor) if normalize else total)
    np.testing.assert_allclose(found, truth, rtol=2**-20, atol=2**-26)


def write(folder: Path, whole: np.ndarray) -> Path:
    """A checkpoint that holds ``whole`` cut into the tensors of SHAPES."""
    folder.mkdir()
    tensors, first = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        tensors[name] = whole[first : first + size].reshape(shape).copy()
        first += size
    save_file(tensors, folder / "model.safetensors")
    return folder


def recipe_of(tmp_path: Path, num: int, **parameters: Any) -> tuple[dict[str, Any], np.ndarray]:
    """A recipe that merges ``num`` models, and the base and models as rows."""
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    base, tuned = flat_models(num, total)
    folders = [write(tmp_path / f"m{i}", x) for i, x in enumerate((base, *tuned))]
    models = [{"model": str(folder)} for folder in folders[1:]]
    recipe = {"merge_method": "ties", "base_model": str(folders[0]), "models": models}
    return recipe | {"parameters": parameters}, np.stack([base, *tuned])


def result_of(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in SHAPES])


@pytest.mark.parametrize("num", [1, 3])
def test_the_official_preset_over_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    """Threshold, ties and majority are the whole model's, resident or streamed in small tiles."""
    monkeypatch.setenv("PYMERGE_BACKEND", "reference")
    recipe, rows = recipe_of(tmp_path, num, preset="official", **{"lambda": 0.7})
    pymerge.merge(recipe, tmp_path / "out")
    truth = rows[0] + 0.7 * official(rows[1:].astype(np.float64) - rows[0], 0.2, "count")
    found = result_of(tmp_path / "out")
    np.testing.assert_allclose(found, truth, rtol=2**-22, atol=2**-26)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", 4096 + 8192)
    monkeypatch.setattr(memory, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr(memory, "SMALLEST_ARENA", 1 << 17)
    monkeypatch.setattr(memory, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(memory, "SELECTION_SHARE", 1 << 60)
    monkeypatch.setattr(memory, "TABLE_BYTES", 0)
    plan = pymerge.plan(recipe, memory=1 << 18, threads=1)
    assert max(plan.tiling.num_tiles(job) for job in plan.jobs) > 2
    pymerge.merge(plan, tmp_path / "streamed")
    assert np.array_equal(result_of(tmp_path / "streamed"), found)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"ties": "index"}, "needs ties: all"),
        ({"rescale": True}, "rescale: true"),
        (
            {"elect": "weighted", "weight": [{"filter": "a.", "value": 0.5}, {"value": 1.0}]},
            "weights that do not vary",
        ),
    ],
)
def test_what_a_majority_of_the_model_cannot_be_combined_with(
    tmp_path: Path, parameters: dict[str, Any], sentence: str
) -> None:
    recipe, _ = recipe_of(tmp_path, 2, preset="official", **parameters)
    with pytest.raises(pymerge.RecipeError, match=sentence):
        pymerge.plan(recipe)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trim_scope", ("tensor", "model")),
        ("ties", ("all", "index")),
        ("elect", ("weighted", "plain")),
        ("zero_sign", ("plus", "skip")),
    ],
)
def test_what_a_trim_of_the_model_needs_alike(
    tmp_path: Path, name: str, words: tuple[str, str]
) -> None:
    """One threshold and one sign hold for the whole model: a word of one tensor alone would be
    passed over, or that of the first tensor taken for all."""
    varies = [{"filter": "a.", "value": words[0]}, {"value": words[1]}]
    recipe, _ = recipe_of(
        tmp_path, 2, **{"weight": 1.0, "density": 0.5, "trim_scope": "model", name: varies}
    )
    with pytest.raises(pymerge.RecipeError, match=f"{name} must not vary"):
        pymerge.plan(recipe)


@pytest.mark.parametrize("density", [0.0, 1.0, 0.9999])
def test_ties_all_at_the_ends(density: float) -> None:
    """Nothing and everything; the threshold itself may be the smallest element."""
    base, tuned = flat_models(1, 50)
    found = pymerge.merge_tensor(
        "ties", base, tuned, weight=1.0, density=density, ties="all", backend="reference"
    )
    assert np.array_equal(found, base if density == 0 else tuned[0])


def test_ranks_of_one_model_and_of_a_score() -> None:
    """Several ranks of one model at once, of tiles that come piece by piece from scratch memory."""
    from pymerge.methods.protocol import Tensor, Tile, answer
    from pymerge.ops.opset import choose_ops
    from pymerge.ops.view import view

    values = np.random.default_rng(3).choice(np.arange(-40, 41), 1000).astype(np.float32)
    ops = choose_ops((*trim.TRIM_OPS, "axpy_n"), asked="reference")
    tensor = Tensor("t", values.shape, 1, False, {}, [{}], ops)
    whole = Tile(0, 1000, None, (view(values),))
    tiles = [tile for _, tile in whole.pieces(333)]

    def doubled(tile: Tile):  # type: ignore[no-untyped-def]
        for _, piece in tile.pieces(100):
            scratch = ops.buffer(piece.num)
            ops.axpy_n(scratch.view, piece.models, [2.0])
            yield Tile(piece.start, piece.num, None, (scratch.view,))

    def measure(question):  # type: ignore[no-untyped-def]
        chosen = tiles if question.only is None else [tiles[question.only]]
        results = [question.run(tile) for tile in chosen]
        return results if question.fold is None else sum(results[1:], start=results[0])

    descending = np.sort(np.abs(2 * values))[::-1]
    ranks = [1, 250, 251, 1000]
    for limit in (1 << 18, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trim, "COLLECT_LIMIT", limit)
            patch.setattr(trim, "SAMPLE_SIZE", 64)
            keys = answer(trim.tensor_keys(tensor, ranks, models=[0] * 4, ranked=doubled), measure)
            keeps = answer(
                trim.trim_tensor(tensor, [300, 0, 7], models=[0] * 3, ranked=doubled), measure
            )
        found = np.array(keys, np.int32).view(np.float32)
        assert np.array_equal(found, descending[[rank - 1 for rank in ranks]])
        magnitudes = np.abs(2 * values).view(np.int32)
        index = np.arange(1000)
        for keep, k in zip(keeps, (300, 0, 7), strict=True):
            kept = (magnitudes > keep.threshold) | (
                (magnitudes == keep.threshold) & (index < keep.cutoff)
            )
            expected = np.argsort(-np.abs(values), kind="stable")[:k]
            assert np.array_equal(np.flatnonzero(kept), np.sort(expected))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_where_no_two_magnitudes_are_equal_all_is_one_more(scope: str) -> None:
    tau = np.random.default_rng(6).permutation(np.arange(1, 1001)).astype(np.float32)
    counts = {
        ties: np.count_nonzero(
            pymerge.merge_tensor(
                "ties",
                np.zeros_like(tau),
                [tau],
                weight=1.0,
                density=0.25,
                ties=ties,
                trim_scope=scope,
                backend="reference",
            )
        )
        for ties in ("index", "all")
    }
    assert counts == {"index": 250, "all": 251}
