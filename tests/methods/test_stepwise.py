"""Numerics mergekit: against a naive computation that rounds float32 after every step, with masks
of torch's global generator; and what must not change a byte of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.errors import PlanError, RecipeError
from pymerge.formats import BF16, F32
from pymerge.in_memory import tiles
from pymerge.methods.numerics import method_in
from pymerge.methods.protocol import SPAN, Tensor
from pymerge.methods.stepwise import pieces
from pymerge.methods.stepwise.table import MODULES
from pymerge.ops.opset import choose_ops

FORMATS = [torch.bfloat16, torch.float16, torch.float32]
#: Ends shortly after a piece, within one of torch's vectors.
ODD = pieces.PIECE + 5
Step = Callable[[torch.Tensor], torch.Tensor]

#: Parameters and number of models of every method.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"weight": [0.3, 0.5, 0.9]}, 3),
    "slerp": ({"t": 0.3}, 1),
    "nuslerp": ({"weight": [0.4, 0.9]}, 2),
    "multislerp": ({"weight": [0.4, 0.9, 0.2]}, 3),
    "karcher": ({}, 3),
    "passthrough": ({"scale": 0.3}, 1),
    "task_arithmetic": ({"weight": [0.3, 0.7, -0.2]}, 3),
    "ties": ({"weight": [1.0, 0.7, 0.4], "density": [0.2, 0.5, 0.8], "rescale": True}, 3),
    "dare_linear": ({"weight": [0.4, 0.7], "density": [0.6, 0.3]}, 2),
    "dare_ties": ({"weight": [0.4, 0.7], "density": 0.5, "seed": 9}, 2),
    "breadcrumbs": ({"weight": [0.4, 0.7], "density": 0.6, "gamma": 0.02}, 2),
    "breadcrumbs_ties": ({"weight": [0.4, 0.7], "density": 0.9}, 2),
    "della": ({"weight": [0.4, 0.7], "density": 0.6}, 2),
    "della_linear": ({"weight": [0.4, 0.7], "density": 0.5}, 2),
    "model_stock": ({}, 3),
    "nearswap": ({"t": 0.001}, 1),
    "sce": ({"select_topk": 0.4}, 3),
    "ram": ({"epsilon": 0.002}, 3),
    "ramplus_tl": ({"epsilon": 0.002}, 3),
    "arcee_fusion": ({}, 1),
}


def inputs(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    models = [base + torch.randn(shape, generator=generator) * 2e-3 for _ in range(count)]
    return base.to(dtype), [model.to(dtype) for model in models]


def merged(
    name: str,
    base: torch.Tensor,
    models: list[torch.Tensor],
    **options: Any,
) -> torch.Tensor:
    takes_base = method_in(name, "accurate").spec.base != "input"
    result: torch.Tensor = pymerge.merge_tensor(
        name, base if takes_base else None, models, numerics="mergekit", **options
    )
    return result


def rounding(dtype: torch.dtype) -> Step:
    """float32 numbers of which each is one of ``dtype``."""
    return lambda x: x.to(dtype).float()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal numbers; a zero may have the other sign."""
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), int((found != expected).sum())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_rounds_every_step(dtype: torch.dtype, normalize: bool) -> None:
    base, models = inputs((ODD,), 3, dtype)
    weights, r = [0.3, 0.7, -0.2], rounding(dtype)
    given = r(torch.tensor(weights))
    total, divisor = torch.zeros(ODD), torch.zeros(())
    for weight, model in zip(given, models, strict=True):
        total = total + r(r(model.float() - base.float()) * weight)
        divisor = divisor + weight
    mixed = r(total)
    if normalize:
        mixed = r(mixed / r(divisor))
    expected = r(base.float() + r(mixed * 0.8)).to(dtype)
    parameters = {"weight": weights, "lambda_": 0.8, "normalize": normalize}
    same(merged("task_arithmetic", base, models, **parameters), expected)


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest magnitudes, of equal ones the first."""
    order = torch.sort(delta.abs(), descending=True, stable=True).indices
    mask = torch.zeros_like(delta)
    mask[order[: max(1, int(density * len(delta)))]] = 1
    return delta * mask


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("normalize", [False, True])
def test_ties_rounds_every_step(dtype: torch.dtype, normalize: bool) -> None:
    base, models = inputs((ODD,), 3, dtype)
    weights, densities, r = [1.0, -0.7, 0.4], [0.2, 0.5, 0.8], rounding(dtype)
    given = r(torch.tensor(weights))
    deltas = [
        r(trimmed(r(model.float() - base.float()), density) * weight)
        for model, density, weight in zip(models, densities, given, strict=True)
    ]
    sign = torch.where(r(torch.stack(deltas).sum(0)) >= 0, 1.0, -1.0)
    total, divisor = torch.zeros(ODD), torch.zeros(ODD)
    for delta, weight in zip(deltas, given, strict=True):
        agrees = delta.sign() == sign
        total = total + delta * agrees
        divisor = divisor + weight * agrees
    mixed, divisor = r(total), r(divisor)
    if normalize:
        mixed = r(mixed / torch.where(divisor == 0, 1.0, divisor))
    expected = r(base.float() + mixed).to(dtype)
    found = merged("ties", base, models, weight=weights, density=densities, normalize=normalize)
    same(found, expected)


@pytest.mark.parametrize("dtype", FORMATS)
def test_linear_rounds_once(dtype: torch.dtype) -> None:
    base, models = inputs((300, 70), 3, dtype)
    weights = np.array([0.3, 0.5, 0.9], np.float32).astype(np.float64)
    exact = sum(w * model.double().numpy() for w, model in zip(weights, models, strict=True))
    found = merged("linear", base, models, weight=[0.3, 0.5, 0.9])
    error = np.abs(found.double().numpy() - exact / weights.sum())
    # A product, three sums and a division in float32, and the rounding to the result.
    largest = np.max([model.double().abs().numpy() for model in models], axis=0)
    allowed = 6 * 2.0**-24 * largest + torch.finfo(dtype).eps / 2 * found.double().abs().numpy()
    assert (error <= allowed + float(torch.finfo(dtype).smallest_normal)).all()


def dropped(delta: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """One draw of torch's global generator for each element."""
    work = delta.dtype if delta.dtype == torch.bfloat16 else torch.float32
    mask = torch.bernoulli(torch.full(delta.shape, density, dtype=work))
    whole = delta.to(work)
    left = whole * mask
    if rescale:
        left = left * (whole.abs().sum() / left.abs().sum())
    return left.to(delta.dtype)


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads until the test is over; mergekit -j 1 adds up on one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_draws_from_torchs_generator(
    dtype: torch.dtype, rescale: bool, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(1)
    base, models = inputs((257, 140), 3, dtype)
    weights, densities = [0.4, 0.7, 0.2], [0.6, 1.0, 0.3]
    torch.manual_seed(77)
    deltas = []
    for model, density in zip(models, densities, strict=True):
        delta = model - base
        deltas.append(delta if density == 1 else dropped(delta, density, rescale))
    scaled = torch.stack(deltas) * torch.tensor(weights, dtype=dtype).view(-1, 1, 1)
    expected = base + scaled.sum(0)
    found = merged(
        "dare_linear",
        base,
        models,
        weight=weights,
        density=densities,
        rescale=rescale,
        seed=77,
        threads=2,
    )
    same(found, expected)


def write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def two_models(tmp_path: Path) -> dict[str, Any]:
    """A recipe for DARE over tensors whose order by name is another than by number."""
    generator = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.weight" for i in (2, 9, 10, 11)]
    base = {name: torch.randn(40, 50, generator=generator) for name in names}
    model = {name: base[name] + torch.randn(40, 50, generator=generator) for name in names}
    path = write_model(tmp_path / "base", base)
    other = write_model(tmp_path / "model", model)
    parameters = {"weight": 1.0, "density": 0.5}
    return {
        "merge_method": "dare_linear",
        "base_model": path,
        "models": [{"model": other, "parameters": parameters}],
        "parameters": {"rescale": False},
    }


def outputs(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_draws_go_through_tensors_in_the_order_of_their_names(
    two_models: dict[str, Any], tmp_path: Path
) -> None:
    pymerge.merge(
        two_models, tmp_path / "out", numerics="mergekit", random_seed=5, threads=2, sync=False
    )
    base = outputs(Path(two_models["base_model"]))
    model = outputs(Path(two_models["models"][0]["model"]))
    found = outputs(tmp_path / "out")
    torch.manual_seed(5)
    for name in sorted(base):
        kept = torch.bernoulli(torch.full(base[name].shape, 0.5))
        same(found[name], base[name] + (model[name] - base[name]) * kept)


def test_the_seed_of_all_tensors_is_the_one_given(
    two_models: dict[str, Any], tmp_path: Path
) -> None:
    def bytes_of(name: str, **options: Any) -> bytes:
        pymerge.merge(two_models, tmp_path / name, numerics="mergekit", sync=False, **options)
        return (tmp_path / name / "model.safetensors").read_bytes()

    without = bytes_of("without")
    assert bytes_of("zero", random_seed=0) == without
    assert bytes_of("one", random_seed=1) != without
    two_models["parameters"]["seed"] = 1
    assert bytes_of("in-recipe") == bytes_of("over-recipe", random_seed=1)
    two_models["parameters"]["seed"] = [{"filter": "layers.9", "value": 2}, {"value": 1}]
    with pytest.raises(RecipeError, match=r"seed must not vary.*remove its filter"):
        pymerge.plan(two_models, numerics="mergekit")


@pytest.mark.parametrize("name", WAYS)
def test_threads_and_tiles_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, torch_threads: Callable[[int], None]
) -> None:
    parameters, count = WAYS[name]
    base, models = inputs((331, 199), count, torch.bfloat16)
    torch_threads(2)
    found = [merged(name, base, models, threads=threads, **parameters) for threads in (1, 2)]
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", SPAN)
    found.append(merged(name, base, models, threads=2, **parameters))
    for other in found[1:]:
        assert torch.equal(other.view(torch.int16), found[0].view(torch.int16))
    assert torch.isfinite(found[0]).all()


def test_six_models_are_added_up_as_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch adds up more than four rows in another order in the last, narrow columns."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", SPAN)
    for num in (1, 3, SPAN + 1, 2 * SPAN + 5, ODD):
        base, models = inputs((num,), 6, torch.float32, seed=num)
        weights = [0.3, 0.7, -0.2, 0.55, 0.125, 0.9]
        deltas = torch.stack([model - base for model in models])
        expected = base + (deltas * torch.tensor(weights).view(6, 1)).sum(0)
        same(merged("task_arithmetic", base, models, weight=weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WAYS)
def test_memory_is_no_more_than_stated(name: str, dtype: torch.dtype) -> None:
    parameters, count = WAYS[name]
    base, models = inputs((400, 300), count, dtype)
    method = method_in(name, "mergekit")
    specs = method.spec.parameters
    shared = {k: parameters.get(k, v.default) for k, v in specs.items() if v.scope == "shared"}
    each = [
        {k: _nth(parameters.get(k, v.default), i) for k, v in specs.items() if v.scope == "model"}
        for i in range(count)
    ]
    working = BF16 if dtype == torch.bfloat16 else F32
    has_base = method.spec.base != "input"
    tensor = Tensor(
        "tensor", (400, 300), count, has_base, shared, each, choose_ops(method.ops, asked="cpu")
    )
    assert method.cost is not None
    stated = method.cost(replace(tensor, working=working)).num_bytes
    run = lambda: merged(name, base, models, threads=1, **parameters)  # noqa: E731
    run()
    assert peak_bytes(run) - base.nbytes <= stated


def _nth(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list) else value


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch held at once during ``run``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(np.cumsum([num_bytes for _, num_bytes in changes], dtype=np.int64))


def test_every_method_of_mergekit_has_a_form() -> None:
    assert sorted(MODULES) == sorted(WAYS)
    for name in MODULES:
        assert method_in(name, "mergekit").spec.name == name


def test_other_methods_are_refused() -> None:
    base, models = inputs((4, 4), 2, torch.float32)
    with pytest.raises(RecipeError, match=r"'wudi' is no method of mergekit.*Leave --numerics out"):
        merged("wudi", base, models)


def test_parameters_that_mergekit_lacks_are_refused() -> None:
    base, models = inputs((4, 4), 3, torch.float32)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("ties", {"weight": 1.0, "trim_scope": "model"}),
        ("ties", {"weight": 1.0, "ties": "all"}),
        ("dare_ties", {"weight": 1.0, "rescale_by": "density"}),
        ("model_stock", {"clamp": True}),
        ("sce", {"mask": "weights"}),
    ]
    for name, parameters in refused:
        with pytest.raises(RecipeError, match=r"mergekit's \w+ has no '\w+', found"):
            merged(name, base, models, **parameters)


def test_float64_is_refused() -> None:
    base, models = inputs((4, 4), 2, torch.float64)
    with pytest.raises(RecipeError, match=r"computed in F64, expected F32, F16, BF16; set dtype"):
        merged("ties", base, models, weight=1.0)


def test_della_refuses_what_mergekit_cannot_rank() -> None:
    base, models = inputs((40, 1), 2, torch.float32)
    with pytest.raises(RecipeError, match="one element in each row"):
        merged("della", base, models, weight=1.0, density=0.5)
    base, models = inputs((4, 10), 2, torch.float32)
    with pytest.raises(RecipeError, match="must lie between 0 and 1"):
        merged("della", base, models, weight=1.0, density=0.9)


def test_a_format_in_between_rounds(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(100, 3)}
    path = write_model(tmp_path / "model", tensors)
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": path}],
        "dtype": "bfloat16",
        "out_dtype": "float32",
    }
    pymerge.merge(recipe, tmp_path / "out", numerics="mergekit", sync=False)
    assert torch.equal(outputs(tmp_path / "out")["weight"], tensors["weight"].bfloat16().float())


def test_too_little_memory_is_said_before_anything_is_read(tmp_path: Path) -> None:
    shape = (4096, 4096)
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {"weight": torch.zeros(shape, dtype=torch.bfloat16)})
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("a", "b")],
    }
    with pytest.raises(PlanError, match=r"of tensor 'weight' \[4096, 4096\] take .* give at least"):
        pymerge.plan(recipe, numerics="mergekit", memory="400MiB")
    assert pymerge.plan(recipe, numerics="mergekit", memory="1GiB").tiling.matrix_bytes
