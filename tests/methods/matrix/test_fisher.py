"""Fisher merging against its formula in float64, in memory, from files and from what is collected;
RegMean too where it is collected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import pymerge
from pymerge import api
from pymerge.errors import PlanError, PymergeError, RecipeError

Arrays = list[np.ndarray]

#: Each sum of N terms and each product is rounded to float32 once.
RELATIVE = 12 * 2.0**-24


def problem(shape: tuple[int, ...], num: int, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Weights near one another, and diagonals over many magnitudes."""
    generator = np.random.default_rng(seed)
    base = generator.normal(0, 0.05, shape)
    weights = [base + generator.normal(0, 0.01, shape) for _ in range(num)]
    diagonals = [np.exp(generator.normal(-9 + k, 4, shape)) for k in range(num)]
    weights, diagonals = (
        [np.asarray(x, np.float32) for x in each] for each in (weights, diagonals)
    )
    return weights, diagonals


def expected_mean(
    weights: Arrays,
    diagonals: Arrays,
    *,
    epsilon: float = 1e-6,
    floor: str = "add",
    factors: Any = None,
    norms: Any = None,
    favor_first: bool = False,
) -> np.ndarray:
    """The formula, all in float64."""
    num, den = 0.0, 0.0
    for k, (theta, diagonal) in enumerate(zip(weights, diagonals, strict=True)):
        c = (1.0 if factors is None else factors[k]) / (1.0 if norms is None else norms[k])
        own = 0.0 if favor_first and k else epsilon
        wide = diagonal.astype(float)
        share = c * (wide + own if floor == "add" else np.maximum(wide, own))
        num, den = num + share * theta.astype(float), den + share
    return num / den


def norms_of(diagonals: Arrays) -> list[float]:
    return [float(np.linalg.norm(d.astype(float))) for d in diagonals]


def check_close(found: np.ndarray, expected: np.ndarray, weights: Arrays) -> None:
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= RELATIVE * max(np.abs(w).max() for w in weights)


@pytest.mark.parametrize("shape", [(20, 33), (7,), (), (3, 4, 5)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("favor_first", [True, False])
@pytest.mark.parametrize("floor", ["add", "max"])
def test_it_is_the_mean_by_diagonals(
    shape: tuple[int, ...], normalize: bool, favor_first: bool, floor: str
) -> None:
    weights, diagonals = problem(shape, 3)
    given = [0.5, 2.0, 1.0]
    options: dict[str, Any] = {"epsilon": 1e-3, "floor": floor, "favor_first": favor_first}
    found = pymerge.merge_tensor(
        "fisher", None, weights, statistics=diagonals, weight=given, normalize=normalize, **options
    )
    norms = norms_of(diagonals) if normalize else None
    expected = expected_mean(weights, diagonals, factors=given, norms=norms, **options)
    check_close(found, expected, weights)


def test_the_authors_preset_is_their_rule() -> None:
    weights, diagonals = problem((40, 9), 2)
    diagonals = [np.where(d < 1e-4, 0, d).astype(np.float32) for d in diagonals]
    found = pymerge.merge_tensor(
        "fisher", None, weights, statistics=diagonals, preset="official", epsilon=1e-5
    )
    expected = expected_mean(
        weights, diagonals, norms=norms_of(diagonals), epsilon=1e-5, floor="max", favor_first=True
    )
    check_close(found, expected, weights)
    nothing = (diagonals[0] == 0) & (diagonals[1] == 0)
    assert nothing.any()
    assert np.abs(found - weights[0])[nothing].max() < 1e-7


def test_elements_that_matter_to_no_model_are_the_mean() -> None:
    """Without a floor too, by the factors alone."""
    weights, _ = problem((8, 8), 3)
    zeros = [np.zeros((8, 8), np.float32)] * 3
    given = [1.0, 2.0, 5.0]
    expected = np.average(np.array(weights, float), axis=0, weights=given)
    for epsilon in (1e-6, 0.0):
        found = pymerge.merge_tensor(
            "fisher",
            None,
            weights,
            statistics=zeros,
            weight=given,
            epsilon=epsilon,
            normalize=False,
        )
        check_close(found, expected, weights)


def test_equal_diagonals_give_the_mean_and_one_model_itself() -> None:
    weights, diagonals = problem((12, 16), 3)
    found = pymerge.merge_tensor("fisher", None, weights, statistics=[diagonals[0]] * 3)
    check_close(found, np.mean(np.array(weights, float), axis=0), weights)
    alone = pymerge.merge_tensor("fisher", None, weights[:1], statistics=diagonals[:1])
    assert (alone == weights[0]).all()
    with pytest.raises(PymergeError, match=r"needs statistics=.*Fisher diagonal; found none"):
        pymerge.merge_tensor("fisher", None, weights)


def test_formats_may_be_mixed() -> None:
    weights, diagonals = problem((30, 7), 3)
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    models = [torch.from_numpy(w).to(kind) for w, kind in zip(weights, kinds, strict=True)]
    beside = [torch.from_numpy(d).to(kind) for d, kind in zip(diagonals, kinds, strict=True)]
    found = pymerge.merge_tensor("fisher", None, models, statistics=beside, out_dtype="float32")
    read, wide = ([x.float().numpy() for x in each] for each in (models, beside))
    check_close(found.numpy(), expected_mean(read, wide, norms=norms_of(wide)), read)


def test_threads_do_not_matter() -> None:
    weights, diagonals = problem((700, 520), 3)
    found = {
        pymerge.merge_tensor("fisher", None, weights, statistics=diagonals, threads=n).tobytes()
        for n in (1, 2, 5)
    }
    assert len(found) == 1


def test_what_is_not_finite_stays_where_it_is() -> None:
    weights, diagonals = problem((6, 8), 2)
    weights[0][1, 2], weights[1][3, 4] = np.nan, np.inf
    diagonals[1][5, 6] = np.nan
    found = pymerge.merge_tensor(
        "fisher", None, weights, statistics=diagonals, normalize=False, floor="max"
    )
    assert np.argwhere(~np.isfinite(found)).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_what_cannot_be_a_mean_is_refused() -> None:
    weights, diagonals = problem((4, 4), 2)
    zero = [diagonals[0], np.zeros((4, 4), np.float32)]
    with pytest.raises(RecipeError, match=r"tensors\[1\] is zero everywhere.*normalize: false"):
        pymerge.merge_tensor("fisher", None, weights, statistics=zero)
    found = pymerge.merge_tensor("fisher", None, weights, statistics=zero, weight=[1.0, 0.0])
    assert np.abs(found - weights[0]).max() <= RELATIVE
    with pytest.raises(RecipeError, match=r"the weights of tensor .* sum to zero"):
        pymerge.merge_tensor("fisher", None, weights, statistics=diagonals, weight=0.0)
    with pytest.raises(PymergeError, match=r"statistics\[1\] has shape \(4,\)"):
        pymerge.merge_tensor("fisher", None, weights, statistics=[diagonals[0], diagonals[1][0]])


def write_model(folder: Path, tensors: dict[str, np.ndarray], fisher: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if fisher is not None:
        beside = folder / "pymerge-statistics"
        beside.mkdir()
        save_file(fisher, beside / "fisher.safetensors")
        index = {
            "file": "fisher.safetensors",
            "norm": norm_of_all(fisher),
            "examples": 64,
            "estimator": "monte_carlo",
        }
        (beside / "statistics.json").write_text(json.dumps({"format": 1, "fisher": index}))
    return folder


def norm_of_all(fisher: dict[str, np.ndarray]) -> float:
    return float(np.linalg.norm(norms_of(list(fisher.values()))))


SHAPES = {"layers.0.fc.weight": (1000, 1500), "layers.0.norm.weight": (1500,), "b": (2, 3)}


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """In the folders 0, 1 and 2; the last tensor has no diagonal."""
    made = {name: problem(shape, 3, len(name)) for name, shape in SHAPES.items()}
    tensors = [{name: weights[k] for name, (weights, _) in made.items()} for k in range(3)]
    fishers = [{n: found[k] for n, (_, found) in made.items() if n != "b"} for k in range(3)]
    for k in range(3):
        write_model(tmp_path / str(k), tensors[k], fishers[k])
    return tensors, fishers


def recipe_of(folders: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "fisher",
        "models": [{"model": str(folder)} for folder in folders],
        "parameters": parameters,
        "dtype": "float32",
    }


def test_from_files_within_any_budget(tmp_path: Path, models: Any) -> None:
    tensors, fishers = models
    recipe = recipe_of([tmp_path / str(k) for k in range(3)], epsilon=1e-4)
    norms = [norm_of_all(fisher) for fisher in fishers]
    written = []
    for name, budget, threads in (("large", "600MiB", 2), ("small", "128MiB", 1)):
        plan = api.plan(recipe, memory=budget, threads=threads)
        api.merge(plan, tmp_path / name)
        tiling = plan.tiling
        fits = [tiling.resident_blocks(job) <= tiling.num_blocks for job in plan.jobs]
        assert all(fits) == (name == "large")
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    found = load_file(tmp_path / "small" / "model.safetensors")
    for name in SHAPES:
        weights = [tensor[name] for tensor in tensors]
        beside = [f.get(name, np.zeros(SHAPES[name], np.float32)) for f in fishers]
        given = norms if name in fishers[0] else None
        expected = expected_mean(weights, beside, epsilon=1e-4, norms=given)
        check_close(found[name], expected, weights)
    assert not (tmp_path / "small" / "pymerge-statistics").exists()


def test_models_without_diagonals_are_named(tmp_path: Path, models: Any) -> None:
    tensors, _ = models
    write_model(tmp_path / "bare", tensors[0], None)
    with pytest.raises(PlanError, match=r"found none beside .*bare; collect.*kind='fisher'"):
        api.plan(recipe_of([tmp_path / "0", tmp_path / "bare"]), memory="600MiB")


def test_a_diagonal_of_zeros_is_refused_by_the_plan(tmp_path: Path, models: Any) -> None:
    tensors, fishers = models
    write_model(tmp_path / "sure", tensors[0], {k: 0 * v for k, v in fishers[0].items()})
    with pytest.raises(RecipeError, match="zero everywhere"):
        api.plan(recipe_of([tmp_path / "0", tmp_path / "sure"]), memory="600MiB")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return found


def make_nets(tmp_path: Path) -> tuple[list[Net], list[torch.Tensor], list[Path]]:
    nets, inputs, folders = [], [], []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Net())
        inputs.append(torch.randn(40, 6) * torch.arange(1.0, 7.0).roll(3 * seed))
        tensors = {k: v.detach().numpy() for k, v in nets[-1].state_dict().items()}
        folders.append(write_model(tmp_path / f"net{seed}", tensors, None))
    return nets, inputs, folders


def merged(tmp_path: Path, recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    api.merge(api.plan(recipe, memory="600MiB"), tmp_path / "merged")
    found: dict[str, np.ndarray] = load_file(tmp_path / "merged" / "model.safetensors")
    return found


def exact_fisher(net: Net, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    """E_x sum_c p_c (d log p_c)^2, one example and one class at a time, in float64."""
    wide = Net().double()
    wide.load_state_dict(net.state_dict())
    total = {name: torch.zeros_like(value) for name, value in wide.named_parameters()}
    for x in inputs.double():
        logs = wide(x).log_softmax(-1)
        for log in logs:
            grads = torch.autograd.grad(log, list(wide.parameters()), retain_graph=True)
            for (name, _), grad in zip(wide.named_parameters(), grads, strict=True):
                total[name] += log.exp().detach() * grad**2 / len(inputs)
    return {name: value.numpy() for name, value in total.items()}


def test_collected_saved_and_merged(tmp_path: Path) -> None:
    nets, inputs, folders = make_nets(tmp_path)
    for net, rows, folder in zip(nets, inputs, folders, strict=True):
        with pymerge.collect(net, kind="fisher", estimator="exact") as collector:
            for batch in rows.split(16):
                collector.backward(net(batch))
        collector.save(folder)
    found = merged(tmp_path, recipe_of(folders))
    fishers = [exact_fisher(net, rows) for net, rows in zip(nets, inputs, strict=True)]
    norms = [norm_of_all(fisher) for fisher in fishers]
    for name in found:
        weights = [net.state_dict()[name].numpy() for net in nets]
        expected = expected_mean(weights, [fisher[name] for fisher in fishers], norms=norms)
        # the gradients are float32: each diagonal is within some 1e-6 of the exact one
        assert np.abs(found[name] - expected).max() < 1e-5 * np.abs(weights[0] - weights[1]).max()


def test_grams_collected_saved_and_merged(tmp_path: Path) -> None:
    nets, inputs, folders = make_nets(tmp_path)
    for net, rows, folder in zip(nets, inputs, folders, strict=True):
        with pymerge.collect(net, kind="gram") as collector, torch.no_grad():
            for batch in rows.split(16):
                net(batch)
        collector.save(folder)
    recipe = recipe_of(folders, alpha=0.9)
    found = merged(tmp_path, {**recipe, "merge_method": "regmean"})
    states = [{k: v.double().numpy() for k, v in net.state_dict().items()} for net in nets]
    seen = {"first": [x.double().numpy() for x in inputs], "last": []}
    for state, x in zip(states, seen["first"], strict=True):
        seen["last"].append(np.tanh(x @ state["first.weight"].T + state["first.bias"]))
    for layer, rows_of in seen.items():
        grams = [x.T @ x / len(x) for x in rows_of]
        grams = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
        total, weights = sum(grams), [state[f"{layer}.weight"] for state in states]
        shift = 1e-4 * np.diag(total).mean() * np.eye(len(total))
        right = sum(g @ w.T for g, w in zip(grams, weights, strict=True))
        right = right + shift @ np.mean(weights, axis=0).T
        expected = np.linalg.solve(total + shift, right).T
        assert np.abs(found[f"{layer}.weight"] - expected).max() < 1e-5 * np.abs(expected).max()
        bias = np.mean([state[f"{layer}.bias"] for state in states], axis=0)
        assert np.abs(found[f"{layer}.bias"] - bias).max() < 1e-7
