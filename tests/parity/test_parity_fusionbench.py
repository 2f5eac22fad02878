"""FusionBench 0.2.33's own functions on small matrices, through drive_fusionbench.py.

That each runs and returns finite parameters; and, where a formula says what FusionBench should
return, that in float64 it does, so that what reaches it is what the jobs below say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge

NUM_TASKS, EXAMPLES = 3, 40
SHAPES = {"a.bias": (24,), "a.weight": (24, 16), "b.bias": (12,), "b.weight": (12, 24)}
MATRICES = [name for name in SHAPES if name.endswith("weight")]

Jobs = Mapping[str, Mapping[str, Any]]
Merged = dict[str, dict[str, torch.Tensor]]


def inputs_of(number: int) -> np.ndarray:
    return np.random.default_rng(100 + number).normal(size=(EXAMPLES, 16))


def values(seed: int, size: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, size, shape) for name, shape in SHAPES.items()}


BASE = values(0, 0.2)
DELTAS = [values(1 + i, 0.02) for i in range(NUM_TASKS)]
TASKS = [{name: BASE[name] + delta[name] for name in SHAPES} for delta in DELTAS]
INPUTS = [inputs_of(i) for i in range(NUM_TASKS)]
GRAMS = [{"a": x.T @ x / EXAMPLES} for x in INPUTS]
FISHERS = [{n: v**2 for n, v in values(10 + i, 1.0).items()} for i in range(NUM_TASKS)]

DATA = {"inputs": INPUTS}
PAIR = {"tasks": TASKS[:2]}
CASES: dict[str, dict[str, Any]] = {
    "doge_ta": {},
    "fisher": {"fishers": FISHERS, "options": {"normalize_fisher_weight": False}},
    "fisher-from-inputs": {**DATA, "method": "fisher", "options": {"batch_size": 1}},
    "iso_c": {},
    "iso_cts": {},
    "knots": {},
    "opcm": {},
    "opcm_clip": {},
    "opcm_step": {**PAIR, "options": {"previous_lambda": 1.5, "lambda": 1.2}},
    "peft_magnitude_prune": {"options": {"density": 0.5}},
    "peft_task_arithmetic": {"options": {"weights": [0.2, 0.3, 0.5]}},
    "peft_ties": {"options": {"density": 0.5}},
    "regmean": {"grams": GRAMS, "options": {"reduce_non_diagonal_ratio": 0.5}},
    "regmean-from-inputs": {**DATA, "method": "regmean", "activation": "relu"},
    "regmean_plusplus": {**DATA, "activation": "relu", "options": {"batch_size": 16}},
    "simple_average": {},
    "slerp": PAIR,
    "smile": {**DATA, "options": {"k": 16, "gate_k": 2, "full_matrices": False}},
    "task_arithmetic": {},
    "ties": {},
    "tsvm": {},
    "tsvm_eigen": {},
    "tsvm_lossless": {},
    "tsvm_lossless_eigen": {},
    "weighted_average": {"options": {"weights": [1, 2, 5]}},
    "wudi": {"options": {"iter_num": 5}},
}


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(dtype)
    if isinstance(value, dict):
        return {key: in_dtype(item, dtype) for key, item in value.items()}
    return [in_dtype(item, dtype) for item in value] if isinstance(value, list) else value


def job(name: str, dtype: torch.dtype) -> dict[str, Any]:
    given = {"method": name, "base": BASE, "tasks": TASKS, **CASES[name]}
    options = given.pop("options", {})
    return {**in_dtype(given, dtype), "options": options}


@pytest.fixture(scope="module")
def merged(fusionbench: Callable[[Jobs], Merged]) -> Merged:
    jobs = {name: job(name, torch.float32) for name in CASES}
    jobs |= {f"{name}-float64": job(name, torch.float64) for name in TRUTHS}
    return fusionbench(jobs)


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    if name == "smile":
        experts = {f"expert/{i}": SHAPES["a.weight"] for i in range(NUM_TASKS)}
        return {"outputs": (EXAMPLES, 24), "router": (EXAMPLES, NUM_TASKS), **experts}
    if name == "knots":
        found: dict[str, tuple[int, ...]] = {}
        for matrix in MATRICES:
            rows, columns = SHAPES[matrix]
            rank = min(rows, NUM_TASKS * columns)
            found |= {f"u/{matrix}": (rows, rank), f"s/{matrix}": (rank,)}
            found |= {f"vh/{i}/{matrix}": (rank, columns) for i in range(NUM_TASKS)}
        return found
    return dict(SHAPES)


@pytest.mark.parametrize("name", CASES)
def test_fusionbench_runs(merged: Merged, name: str) -> None:
    found = merged[name]
    assert {key: tuple(value.shape) for key, value in found.items()} == shapes_of(name)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all(), key
        base = BASE.get(key)
        if base is not None and len(base.shape) == 2:
            assert not np.array_equal(value, base.astype(np.float32)), key


def combination(weights: list[float], base: float) -> dict[str, np.ndarray]:
    """base * the base's parameters and the weighted sum of the tasks' parameters."""
    return {
        name: base * BASE[name] + sum(w * t[name] for w, t in zip(weights, TASKS, strict=True))
        for name in SHAPES
    }


def averaged_vectors() -> dict[str, np.ndarray]:
    return {
        name: BASE[name] + np.mean([d[name] for d in DELTAS], axis=0)
        for name in SHAPES.keys() - set(MATRICES)
    }


def iso_c() -> dict[str, np.ndarray]:
    """The sum of the deltas with the mean of its singular values; vectors are averaged."""
    found = averaged_vectors()
    for name in MATRICES:
        u, s, vh = np.linalg.svd(sum(d[name] for d in DELTAS), full_matrices=False)
        found[name] = BASE[name] + s.mean() * u @ vh
    return found


def tsvm() -> dict[str, np.ndarray]:
    """The top parts of the tasks' spectra between the nearest orthonormal sets of vectors."""

    def nearest(x: np.ndarray) -> np.ndarray:
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        return u @ vh

    found = averaged_vectors()
    for name in MATRICES:
        keep = min(SHAPES[name]) // NUM_TASKS
        parts = [np.linalg.svd(d[name], full_matrices=False) for d in DELTAS]
        u = nearest(np.hstack([u[:, :keep] for u, _, _ in parts]))
        vh = nearest(np.vstack([vh[:keep] for _, _, vh in parts]))
        found[name] = BASE[name] + u * np.concatenate([s[:keep] for _, s, _ in parts]) @ vh
    return found


def least_squares(inputs: list[np.ndarray], name: str, shrink: float = 1.0) -> np.ndarray:
    grams = [x.T @ x / len(x) for x in inputs]
    grams = [shrink * g + (1 - shrink) * np.diag(np.diag(g)) for g in grams]
    right = sum(g @ t[name].T for g, t in zip(grams, TASKS, strict=True))
    return np.linalg.solve(sum(grams), right).T


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def regmean_from_inputs() -> dict[str, np.ndarray]:
    """The second matrix sees each task's own activations."""
    hidden = [relu(x @ t["a.weight"].T + t["a.bias"]) for x, t in zip(INPUTS, TASKS, strict=True)]
    average = combination([1 / NUM_TASKS] * NUM_TASKS, 0)
    first, second = least_squares(INPUTS, "a.weight"), least_squares(hidden, "b.weight")
    return {**average, "a.weight": first, "b.weight": second}


def regmean_plusplus() -> dict[str, np.ndarray]:
    """The second matrix sees the activations of what was merged before it."""
    average = combination([1 / NUM_TASKS] * NUM_TASKS, 0)
    first = least_squares(INPUTS, "a.weight")
    hidden = [relu(x @ first.T + average["a.bias"]) for x in INPUTS]
    return {**average, "a.weight": first, "b.weight": least_squares(hidden, "b.weight")}


def regmean() -> dict[str, np.ndarray]:
    """Grams of the first matrix with halved entries off the diagonal; the rest is averaged."""
    average = combination([1 / NUM_TASKS] * NUM_TASKS, 0)
    return {**average, "a.weight": least_squares(INPUTS, "a.weight", shrink=0.5)}


def fisher() -> dict[str, np.ndarray]:
    weights = [{name: f[name] + 1e-6 for name in SHAPES} for f in FISHERS]
    return {
        name: sum(w[name] * t[name] for w, t in zip(weights, TASKS, strict=True))
        / sum(w[name] for w in weights)
        for name in SHAPES
    }


def smile() -> dict[str, np.ndarray]:
    """At full rank each input goes through the task whose delta's top right vectors it is in."""
    x = INPUTS[0]
    top = [np.linalg.svd(d["a.weight"])[2][:2] for d in DELTAS]
    router = np.stack([np.linalg.norm(x @ vh.T, axis=1) for vh in top], axis=1)
    chosen = router.argmax(axis=1)
    of_tasks = np.stack([x @ t["a.weight"].T + t["a.bias"] for t in TASKS])
    experts = {f"expert/{i}": d["a.weight"] for i, d in enumerate(DELTAS)}
    return {"outputs": of_tasks[chosen, np.arange(len(x))], "router": router, **experts}


TRUTHS: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "fisher": fisher,
    "iso_c": iso_c,
    "peft_task_arithmetic": lambda: combination([0.2, 0.3, 0.5], 0.0),
    "regmean": regmean,
    "regmean-from-inputs": regmean_from_inputs,
    "regmean_plusplus": regmean_plusplus,
    "simple_average": lambda: combination([1 / NUM_TASKS] * NUM_TASKS, 0),
    "smile": smile,
    "task_arithmetic": lambda: combination([0.3] * NUM_TASKS, 1 - 0.3 * NUM_TASKS),
    "tsvm": tsvm,
    "weighted_average": lambda: combination([1 / 8, 2 / 8, 5 / 8], 0),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_fusionbench_follows_its_formula(merged: Merged, name: str) -> None:
    found, expected = merged[f"{name}-float64"], TRUTHS[name]()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # some scalars of FusionBench's are float32: its weights, coefficients and 1 - ratio
        np.testing.assert_allclose(found[key].numpy(), value, rtol=0, atol=1e-7, err_msg=key)


def test_knots_basis_gives_the_deltas_back(merged: Merged) -> None:
    found = {key: value.double().numpy() for key, value in merged["knots"].items()}
    for name in MATRICES:
        for i, delta in enumerate(DELTAS):
            product = found[f"u/{name}"] * found[f"s/{name}"] @ found[f"vh/{i}/{name}"]
            # the parameters, below 1, were rounded to float32 before they were subtracted
            np.testing.assert_allclose(product, delta[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "theirs"), [("iso_c", "iso_c"), ("iso_cts", "iso_cts"), ("tsv_m", "tsvm")]
)
@pytest.mark.parametrize("name", SHAPES)
def test_methods_of_singular_vectors(merged: Merged, method: str, theirs: str, name: str) -> None:
    """Both round the parameters, and the task vectors that they are made of, to float32."""
    base, *tasks = (values[name].astype(np.float32) for values in (BASE, *TASKS))
    found, expected = pymerge.merge_tensor(method, base, tasks), merged[theirs][name].numpy()
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected - base)


SMILE_CASES: dict[str, dict[str, Any]] = {
    "full-rank": {"k": 16, "gate_k": 2},
    "low-rank": {"k": 5, "gate_k": 3, "top_k": 2},
    "dense": {"k": 0, "gate_k": 1, "top_k": 3},
    "weights": {"k": 4, "gate_k": 2, "top_k": 2, "routing_use_diff": False},
}


@pytest.fixture(scope="module")
def upscaled_by_fusionbench(fusionbench: Callable[[Jobs], Merged]) -> Merged:
    jobs = {
        name: {**job("smile", torch.float32), "options": {**options, "full_matrices": False}}
        for name, options in SMILE_CASES.items()
    }
    return fusionbench(jobs)


@pytest.mark.parametrize("name", SMILE_CASES)
def test_smile_computes_what_fusionbench_does(
    upscaled_by_fusionbench: Merged, name: str, tmp_path: Path
) -> None:
    """From the same weights: the layer's outputs, its router's norms, and each expert's matrix."""
    tensors = [in_dtype(each, torch.float32) for each in (BASE, *TASKS)]
    folders = [tmp_path / str(number) for number in range(len(tensors))]
    for folder, each in zip(folders, tensors, strict=True):
        folder.mkdir()
        save_file(each, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "merge_method": "smile",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "parameters": SMILE_CASES[name],
    }
    pymerge.merge(recipe, tmp_path / "out")
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(16, 24), torch.nn.Linear(24, 12)
    layer = pymerge.load_smile(tmp_path / "out", model).a
    x = torch.from_numpy(INPUTS[0]).float()
    with torch.no_grad():
        outputs = layer(x)
        router = torch.einsum("tn,ekn->tek", x, layer.router).norm(dim=-1)
        experts = layer.up @ layer.down if layer.dense is None else layer.dense
    found = upscaled_by_fusionbench[name]
    # The float32 rounding of sums of 16 terms below 3, and of the singular vectors of the experts.
    assert (outputs - found["outputs"]).abs().max() < 5e-6
    assert (router - found["router"]).abs().max() < 1e-4
    for number, expert in enumerate(experts):
        assert (expert - found[f"expert/{number}"]).abs().max() < 1e-6


@pytest.fixture(scope="module")
def by_statistics(fusionbench: Callable[[Jobs], Merged]) -> Merged:
    """In float64, so that what differs is what pymerge rounds."""
    tensors = in_dtype({"base": BASE, "tasks": TASKS, "grams": GRAMS}, torch.float64)
    least = {
        f"regmean {ratio}": {
            **tensors,
            "method": "regmean",
            "options": {"reduce_non_diagonal_ratio": ratio},
        }
        for ratio in (0.5, 1.0)
    }
    tensors = in_dtype({"base": BASE, "tasks": TASKS, "fishers": FISHERS}, torch.float64)
    scaled = {"fisher_scaling_coefficients": [0.2, 0.5, 0.3], "minimal_fisher_weight": 1e-3}
    options = {"fisher": {}, "fisher scaled": scaled}
    means = {
        name: {**tensors, "method": "fisher", "options": given} for name, given in options.items()
    }
    return fusionbench({**least, **means})


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_regmean_from_the_same_grams(by_statistics: Merged, ratio: float) -> None:
    found = pymerge.merge_tensor(
        "regmean",
        None,
        [task["a.weight"].astype(np.float32) for task in TASKS],
        statistics=[gram["a"] for gram in GRAMS],
        alpha=ratio,
        ridge=1e-12,
    )
    expected = by_statistics[f"regmean {ratio}"]["a.weight"].numpy()
    # the weights, below 1, and the Grams are rounded to float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fisher", {}), ("fisher scaled", {"weight": [0.2, 0.5, 0.3], "epsilon": 1e-3})],
)
def test_fisher_by_the_norms_of_whole_models(
    by_statistics: Merged, name: str, parameters: dict[str, Any]
) -> None:
    """FusionBench adds its floor to the norms, of about 50, as well: a share of 2e-5 at 1e-3."""
    norms = [np.sqrt(sum((v**2).sum() for v in fisher.values())) for fisher in FISHERS]
    weights = parameters.get("weight", [1.0] * NUM_TASKS)
    for key in SHAPES:
        found = pymerge.merge_tensor(
            "fisher",
            None,
            [task[key].astype(np.float32) for task in TASKS],
            statistics=[fisher[key].astype(np.float32) for fisher in FISHERS],
            normalize=False,
            weight=[float(w / norm) for w, norm in zip(weights, norms, strict=True)],
            epsilon=parameters.get("epsilon", 1e-6),
        )
        np.testing.assert_allclose(
            found, by_statistics[name][key].numpy(), rtol=0, atol=5e-7, err_msg=key
        )


@pytest.fixture(scope="module")
def on_zeros(fusionbench: Callable[[Jobs], Merged]) -> Merged:
    """Each matrix by itself on a base of zeros, so that float32 inputs are exact in float64."""
    return fusionbench(
        {
            f"{method} {name}": {
                "method": method,
                "base": {name: torch.zeros(SHAPES[name], dtype=torch.float64)},
                "tasks": [{name: torch.from_numpy(x).double()} for x in float32_deltas(name)],
            }
            for method in ("doge_ta", "knots")
            for name in MATRICES
        }
    )


def float32_deltas(name: str) -> list[np.ndarray]:
    return [(delta[name] / 40).astype(np.float32) for delta in DELTAS]


@pytest.mark.parametrize("name", MATRICES)
def test_doge_ta_makes_the_same_iterates(on_zeros: Merged, name: str) -> None:
    base = np.zeros(SHAPES[name], np.float32)
    found = pymerge.merge_tensor("doge_ta", base, float32_deltas(name))
    expected = on_zeros[f"doge_ta {name}"][name].numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", MATRICES)
def test_knots_in_the_same_basis(on_zeros: Merged, name: str) -> None:
    """TIES on FusionBench's coordinates, which it leaves to others; its cut is 1e-4."""
    deltas = float32_deltas(name)
    found = on_zeros[f"knots {name}"]
    left, sigma = found[f"u/{name}"].numpy(), found[f"s/{name}"].numpy()
    kept = []
    for i in range(NUM_TASKS):
        z = sigma[:, None] * found[f"vh/{i}/{name}"].numpy()
        kth = np.sort(np.abs(z).ravel())[z.size - int(0.2 * z.size) - 1]
        kept.append(np.where(np.abs(z) >= kth, z, 0))
    total = np.sum(kept, axis=0)
    agree = np.where(np.array(kept) * np.sign(total) > 0, kept, 0)
    expected = left @ (agree.sum(axis=0) / np.maximum((agree != 0).sum(axis=0), 1))
    merged = pymerge.merge_tensor(
        "knots", np.zeros(SHAPES[name], np.float32), deltas, cut=1e-4, cut_is="absolute"
    )
    assert np.linalg.norm(merged - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def opcm_in_order(fusionbench: Callable[[Jobs], Merged]) -> Merged:
    """Two matrices and two vectors over a base of zeros, merged in float64."""
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    tasks = [in_dtype(delta, torch.float32) for delta in DELTAS]
    tasks = [{name: value.double() for name, value in task.items()} for task in tasks]
    return fusionbench(
        {
            "forward": {"method": "opcm", "base": zeros, "tasks": tasks},
            "backward": {"method": "opcm", "base": zeros, "tasks": tasks[::-1]},
        }
    )


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_opcm_of_a_whole_model(opcm_in_order: Merged, order: str, tmp_path: Path) -> None:
    models = [{n: torch.from_numpy(v).float() for n, v in delta.items()} for delta in DELTAS]
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for name, tensors in (("base", zeros), *((f"task{i}", m) for i, m in enumerate(models))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    numbers = range(NUM_TASKS) if order == "forward" else reversed(range(NUM_TASKS))
    recipe = {
        "merge_method": "opcm",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / f"task{i}")} for i in numbers],
        "dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in opcm_in_order[order].items():
        error = torch.linalg.norm(found[name] - expected) / torch.linalg.norm(expected)
        assert error < 1e-6, name
