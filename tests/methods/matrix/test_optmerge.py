"""OptMerge against the authors' two loops, with full singular value decompositions and autograd."""

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
from pymerge.errors import PymergeError

torch = pytest.importorskip("torch")

_spec = importlib.util.spec_from_file_location("peak", Path(__file__).with_name("peak.py"))
assert _spec is not None
assert _spec.loader is not None
peak = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peak)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small products of the oracles are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Tensors = list[torch.Tensor]
SHAPES = [(24, 40), (40, 24), (32, 32)]
PRESETS = ["full", "lora"]


def tasks(rows: int, columns: int, num: int, scale: float = 3e-4, seed: int = 0) -> Tensors:
    """Task vectors with decaying singular values, of that root mean square."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num):
        short = min(rows, columns)
        left = torch.linalg.qr(torch.randn(rows, short, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(columns, short, generator=generator))[0]
        tau = (left * torch.arange(1, short + 1) ** -0.8) @ right.T
        found.append(tau * (scale / tau.square().mean().sqrt()))
    return found


def cut(tau: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(tau, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def official(
    taus: Tensors,
    preset: str,
    *,
    rank: int | None = None,
    steps: int = 300,
    lr: float | None = None,
) -> torch.Tensor:
    """The authors' loops, in float64: autograd through every task."""
    stack = torch.stack(taus).double()
    mean = stack.mean(0)
    rank = min(stack.shape[1:]) // len(stack) if rank is None else rank
    projectors = torch.stack([cut(tau, rank) for tau in stack])
    if preset == "full":
        targets = torch.stack([cut(tau - mean, rank) + mean for tau in stack])
        theta = torch.nn.Parameter(stack.sum(0))
        optimizer: Any = torch.optim.Adam([theta], lr=lr or 1e-5)
    else:
        targets = projectors
        theta = torch.nn.Parameter(mean.clone())
        optimizer = torch.optim.SGD([theta], lr=lr or 1e-4, momentum=0.9)
    norms = stack.square().sum((1, 2))
    for _ in range(steps):
        disturbed = (theta - targets) @ projectors.mT
        loss = (disturbed.square().sum((1, 2)) / norms).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach()


def merge(taus: Tensors, **parameters: Any) -> torch.Tensor:
    """The merged task vector: the base is zero."""
    return pymerge.merge_tensor("optmerge", torch.zeros_like(taus[0]), taus, **parameters)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [3e-4, 4e-3])
@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_is_the_loop_for_whole_models(shape: tuple[int, int], num: int, scale: float) -> None:
    taus = tasks(*shape, num, scale)
    expected = official(taus, "full")
    assert apart(merge(taus), expected) <= 1e-5
    assert apart(expected, sum(taus).double()) > 1e-2


@pytest.mark.parametrize("lr", [1e-4, 0.02])
@pytest.mark.parametrize("num", [2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_is_the_loop_for_adapters(shape: tuple[int, int], num: int, lr: float) -> None:
    taus = tasks(*shape, num)
    expected = official(taus, "lora", lr=lr)
    mean = sum(taus).double() / num
    error = (merge(taus, preset="lora", lr=lr).double() - expected).norm()
    # The move from the mean is a small part of the result: it is what has to be right.
    assert error <= 1e-5 * (expected - mean).norm() + 1e-7 * mean.norm()


def test_rank() -> None:
    taus = tasks(24, 30, 3)
    for preset in PRESETS:
        assert apart(merge(taus, preset=preset, rank=2), official(taus, preset, rank=2)) <= 1e-5
        # All of them are more than there are.
        assert torch.equal(
            merge(taus, preset=preset, rank=24), merge(taus, preset=preset, rank=10_000)
        )


def test_one_model_is_itself() -> None:
    tau = tasks(16, 24, 1)
    for preset in PRESETS:
        assert apart(merge(tau, preset=preset), tau[0].double()) <= 1e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_hard_cases(preset: str) -> None:
    first, second = tasks(10, 14, 2)
    zero = torch.zeros_like(first)
    assert not merge([zero, zero], preset=preset).any()
    assert merge([first, zero, second], preset=preset).isfinite().all()
    # More models than directions leave nothing to descend on.
    many = tasks(3, 5, 9)
    start = sum(many).double() / (9 if preset == "lora" else 1)
    assert apart(merge(many, preset=preset), start) <= 1e-6
    for shape in ((1, 7), (7, 1), (1, 1)):
        generator = torch.Generator().manual_seed(5)
        vectors = [1e-3 * torch.randn(shape, generator=generator) for _ in range(3)]
        assert merge(vectors, preset=preset).isfinite().all()
        assert merge(vectors, preset=preset, rank=1).isfinite().all()
    for bad in (float("nan"), float("inf")):
        broken = first.clone()
        broken[2, 3] = bad
        assert merge([broken, second], preset=preset).isnan().all()


def test_a_rate_that_diverges_is_an_error() -> None:
    with pytest.raises(PymergeError, match=r"beyond all bounds.*lower lr or steps"):
        merge(tasks(10, 14, 2), preset="lora", lr=1e9)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_acts_on_the_inputs(preset: str) -> None:
    taus = tasks(18, 30, 3, 4e-3)
    turned = [tau.T.contiguous() for tau in taus]
    found = merge(turned, preset=preset, transpose="tensor", lr=1e-3)
    assert torch.equal(found, merge(taus, preset=preset, lr=1e-3).T)
    assert apart(found, merge(turned, preset=preset, lr=1e-3).double()) > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_threads_do_not_change_a_bit(preset: str) -> None:
    taus = tasks(260, 300, 2)
    results = [merge(taus, threads=threads, preset=preset, steps=5) for threads in (1, 2, 5)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(300, 300), (200, 500)])
def test_peak(preset: str, shape: tuple[int, int]) -> None:
    few, measured = peak.stated_and_measured("optmerge", shape, 2, preset=preset, rank=40)
    assert measured <= few
    many, measured = peak.stated_and_measured("optmerge", shape, 5, preset=preset, rank=40)
    assert measured <= many == few


SIZES = {
    "model.layers.0.mlp.up_proj.weight": (48, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 48),
    "model.norm.weight": (24,),
}
MATRICES = [name for name in SIZES if "mlp" in name]
RANK = 3


def write_model(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_adapter(folder: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    folder.mkdir()
    tensors = {}
    for name, (left, right) in factors.items():
        module = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_equal_whole_models(tmp_path: Path, preset: str) -> None:
    random = np.random.default_rng(2)
    base = {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}
    root = write_model(tmp_path / "base", base)
    adapters, taus = [], []
    for number in range(3):
        factors = {
            name: (
                random.normal(0, 0.05, (SIZES[name][0], RANK)).astype(np.float32),
                random.normal(0, 0.05, (RANK, SIZES[name][1])).astype(np.float32),
            )
            for name in MATRICES
        }
        adapters.append(f"{root}+{write_adapter(tmp_path / str(number), factors)}")
        taus.append({name: torch.from_numpy(a @ b) for name, (a, b) in factors.items()})
    rate = {"lr": 1e-3} if preset == "lora" else {}
    recipe = {
        "merge_method": "optmerge",
        "base_model": str(root),
        "models": [{"model": model} for model in adapters],
        "parameters": {"preset": preset, **rate},
    }
    api.merge(recipe, tmp_path / "out", memory="600MiB")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in MATRICES:
        dense = [each[name] for each in taus]
        expected = official(dense, preset, **rate)
        assert apart(torch.from_numpy(found[name]), expected) <= 1e-5
        assert apart(merge(dense, preset=preset, **rate), expected) <= 1e-5
