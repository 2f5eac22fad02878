"""WUDI-Merging: Adam against the authors' loop with autograd, the other solvers against an
eigendecomposition in float64, both written from the paper."""

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
from pymerge.engine.journal import Journal
from pymerge.methods import get_method

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
SOLVERS: list[dict[str, Any]] = [
    {"steps": 7},
    {"solver": "spectral"},
    {"solver": "spectral", "keep": 0.4},
    {"solver": "closed"},
    {"solver": "closed", "ridge": 1e-3},
]


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


def official(taus: Tensors, steps: int = 300, lr: float = 1e-5) -> torch.Tensor:
    """The authors' loop, in float64: autograd through every task."""
    stack = torch.stack(taus).double()
    theta = torch.nn.Parameter(stack.sum(0))
    norms = stack.square().sum((1, 2))
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        disturbed = (theta - stack) @ stack.mT
        loss = (disturbed.square().sum((1, 2)) / norms).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach()


def quadratic(taus: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C, D and the sum in float64, from their definitions."""
    wide = [tau.double() for tau in taus if tau.any()]
    weights = [1 / tau.square().sum() for tau in wide]
    c = sum(w * tau.T @ tau for w, tau in zip(weights, wide, strict=True))
    d = sum(w * tau @ tau.T @ tau for w, tau in zip(weights, wide, strict=True))
    return c, d, sum(wide)


def filtered(taus: Tensors, phi: Any, keep: int | None = None) -> torch.Tensor:
    c, d, start = quadratic(taus)
    values, vectors = torch.linalg.eigh(c)
    factors = torch.zeros_like(values)
    kept = values > 1e-10 * values[-1]
    factors[kept] = phi(values[kept])
    if keep is not None:
        factors[: len(values) - keep] = 0
    return start + (d - start @ c) @ (vectors * factors) @ vectors.T


def loss(theta: torch.Tensor, taus: Tensors) -> float:
    wide = [tau.double() for tau in taus]
    return float(sum(((theta.double() - t) @ t.T).square().sum() / t.square().sum() for t in wide))


def merge(taus: Tensors, **parameters: Any) -> torch.Tensor:
    """The merged task vector: the base is zero."""
    return pymerge.merge_tensor("wudi", torch.zeros_like(taus[0]), taus, **parameters)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [3e-4, 4e-3])
@pytest.mark.parametrize("num", [3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_adam_makes_the_iterates_of_the_official_loop(
    shape: tuple[int, int], num: int, scale: float
) -> None:
    taus = tasks(*shape, num, scale)
    expected = official(taus)
    assert apart(merge(taus), expected) <= 1e-5
    assert apart(expected, sum(taus).double()) > 1e-2


def test_adam_where_products_are_summed_in_parts() -> None:
    taus = tasks(1100, 12, 2)
    assert apart(merge(taus, steps=20), official(taus, 20)) <= 1e-5
    taus = tasks(12, 1100, 2)
    assert apart(merge(taus, steps=20), official(taus, 20)) <= 1e-5


def test_presets() -> None:
    taus = tasks(16, 20, 3)
    name = "model.embed_tokens.weight"
    mean = sum(taus).double() / 3
    assert apart(merge(taus, name=name), mean) <= 1e-6
    found = merge(taus, name=name, preset="fusionbench")
    assert apart(found, official(taus, 400)) <= 1e-5
    assert apart(merge(taus, preset="official_llm"), official(taus, 300, 2e-5)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("visual.transformer.resblocks.3.attn.in_proj_weight", True),
        ("visual.transformer.resblocks.3.attn.out_proj.weight", True),
        ("visual.transformer.resblocks.3.mlp.c_fc.weight", True),
        ("visual.transformer.resblocks.3.mlp.c_proj.weight", True),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", True),
        ("vision_model.encoder.layers.0.self_attn.out_proj.weight", True),
        ("vision_model.encoder.layers.0.mlp.fc2.weight", True),
        ("visual_projection.weight", False),
        ("vision_model.embeddings.position_embedding.weight", False),
        ("visual.proj", False),
    ],
)
def test_official_vit_leaves_the_rest_at_the_base(name: str, merged: bool) -> None:
    taus = tasks(12, 12, 2)
    found = merge(taus, name=name, preset="official_vit")
    if merged:
        assert torch.equal(found, merge(taus))
    else:
        assert not found.any()


@pytest.mark.parametrize("num", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_is_the_stopped_flow(shape: tuple[int, int], num: int) -> None:
    taus = tasks(*shape, num)
    for time in (0.5, 300.0):
        expected = filtered(taus, lambda v, t=time: -(-t * v).expm1() / v)
        assert apart(merge(taus, solver="spectral", time=time), expected) <= 1e-5
    for keep in (0.0, 0.3, 0.65):
        most = int(np.ceil(keep * shape[1]))
        expected = filtered(taus, lambda v: -(-300 * v).expm1() / v, most)
        assert apart(merge(taus, solver="spectral", keep=keep), expected) <= 1e-5


@pytest.mark.parametrize("num", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_closed_is_the_minimiser(shape: tuple[int, int], num: int) -> None:
    taus = tasks(*shape, num)
    c, d, start = quadratic(taus)
    found = merge(taus, solver="closed")
    # Of all minimisers the one of least norm, which does not know where a descent starts.
    assert apart(found, d @ torch.linalg.pinv(c, rtol=1e-10, hermitian=True)) <= 1e-6
    assert (found.double() @ c - d).norm() <= 1e-6 * d.norm()
    assert loss(found, taus) <= loss(merge(taus), taus) * (1 + 1e-6) + 1e-20
    ridge = 1e-3 * c.diagonal().mean()
    expected = start + (d - start @ c) @ torch.linalg.inv(c + ridge * torch.eye(len(c)))
    assert apart(merge(taus, solver="closed", ridge=1e-3), expected) <= 1e-6


def test_tasks_on_independent_inputs_do_not_disturb_one_another() -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(40, 12, generator=generator))[0].T
    taus = [
        1e-3 * torch.randn(20, 4, generator=generator) @ basis[4 * i : 4 * i + 4] for i in (0, 1, 2)
    ]
    found = merge(taus, solver="closed")
    assert loss(found, taus) <= 1e-12 * loss(torch.zeros(20, 40), taus)
    assert apart(found, sum(taus).double()) <= 1e-6


def test_it_acts_on_the_inputs() -> None:
    taus = tasks(18, 30, 3)
    turned = [tau.T.contiguous() for tau in taus]
    for parameters in SOLVERS:
        found = merge(turned, transpose="tensor", **parameters)
        assert torch.equal(found, merge(taus, **parameters).T)
        assert apart(found, merge(turned, **parameters).double()) > 1e-3


def test_split_parts_are_merged_alone() -> None:
    taus = tasks(30, 20, 3)
    found = merge(taus, split="tensor=3", steps=20)
    for first in (0, 10, 20):
        alone = merge([tau[first : first + 10].contiguous() for tau in taus], steps=20)
        assert torch.equal(found[first : first + 10], alone)


@pytest.mark.parametrize("parameters", SOLVERS)
def test_hard_cases(parameters: dict[str, Any]) -> None:
    first, second = tasks(10, 14, 2)
    zero = torch.zeros_like(first)
    both = merge([first, second], **parameters)
    # Zero task vectors have no part; a task alone, or only zeros, is its own minimiser.
    assert torch.equal(merge([first, zero, second], **parameters), both)
    assert not merge([zero, zero], **parameters).any()
    assert apart(merge([first], **parameters), first.double()) <= 1e-6
    many = tasks(3, 5, 9)
    assert merge(many, **parameters).isfinite().all()
    for shape in ((1, 7), (7, 1), (1, 1)):
        generator = torch.Generator().manual_seed(5)
        vectors = [1e-3 * torch.randn(shape, generator=generator) for _ in range(3)]
        assert merge(vectors, **parameters).isfinite().all()
    for bad in (float("nan"), float("inf")):
        broken = first.clone()
        broken[2, 3] = bad
        assert merge([broken, second], **parameters).isnan().all()


def test_duplicates_and_scale_of_the_minimiser() -> None:
    first, second = tasks(10, 14, 2)
    same = merge([first, first, first], solver="closed")
    assert apart(same, first.double()) <= 1e-6
    plain = merge([first, second], solver="closed").double()
    for scale in (1e-20, 1e20):
        found = merge([scale * first, scale * second], solver="closed").double() / scale
        assert apart(found, plain) <= 1e-6
        flow = merge([scale * first, scale * second], solver="spectral").double() / scale
        assert apart(flow, merge([first, second], solver="spectral").double()) <= 1e-5


@pytest.mark.parametrize("parameters", SOLVERS)
def test_threads_do_not_change_a_bit(parameters: dict[str, Any]) -> None:
    for shape in ((260, 300), (300, 260)):
        taus = tasks(*shape, 2)
        results = [merge(taus, threads=threads, **parameters) for threads in (1, 2, 5)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("parameters", SOLVERS)
@pytest.mark.parametrize("shape", [(300, 300), (200, 500)])
def test_peak(parameters: dict[str, Any], shape: tuple[int, int]) -> None:
    few, measured = peak.stated_and_measured("wudi", shape, 2, **parameters)
    assert measured <= few
    many, measured = peak.stated_and_measured("wudi", shape, 5, **parameters)
    assert measured <= many == few


# Merges of files.

SIZES = {
    "model.embed_tokens.weight": (20, 24),
    "model.layers.0.mlp.up_proj.weight": (48, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 48),
    "model.norm.weight": (24,),
}
MATRICES = [name for name in SIZES if "mlp" in name]
RANK = 3


def write_model(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
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


class Adapters:
    """A base of zeros, adapters of it, and the same models as whole checkpoints."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng(2)
        base = {name: np.zeros(shape, np.float32) for name, shape in SIZES.items()}
        self.folder = folder
        self.base = write_model(folder / "base", base)
        self.adapters, self.whole = [], []
        for number in range(3):
            factors = {
                name: (
                    random.normal(0, 0.02, (SIZES[name][0], RANK)).astype(np.float32),
                    random.normal(0, 0.02, (RANK, SIZES[name][1])).astype(np.float32),
                )
                for name in MATRICES
            }
            adapter = write_adapter(folder / f"adapter{number}", factors)
            self.adapters.append(f"{self.base}+{adapter}")
            tuned = {name: left @ right for name, (left, right) in factors.items()}
            self.whole.append(str(write_model(folder / f"tuned{number}", base | tuned)))

    def recipe(self, models: list[str], method: str, **parameters: Any) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": str(self.base),
            "models": [{"model": model} for model in models],
            "parameters": parameters,
        }

    def merged(self, models: list[str], out: str, method: str, **parameters: Any) -> Any:
        api.merge(self.recipe(models, method, **parameters), self.folder / out, memory="600MiB")
        return load_file(self.folder / out / "model.safetensors")


@pytest.mark.parametrize("parameters", SOLVERS)
def test_adapters_equal_whole_models(tmp_path: Path, parameters: dict[str, Any]) -> None:
    case = Adapters(tmp_path)
    found = case.merged(case.adapters, "out", "wudi", **parameters)
    expected = case.merged(case.whole, "dense", "wudi", **parameters)
    # What float32 rounds in C counts up to ``time`` times in the flow.
    bound = 1e-5 if parameters.get("solver", "adam") != "closed" else 2e-7
    for name in MATRICES:
        distance = np.linalg.norm(found[name].astype(float) - expected[name])
        assert distance <= bound * np.linalg.norm(expected[name].astype(float)), name


class Unplugged(Exception):
    pass


@pytest.mark.parametrize("parameters", SOLVERS)
def test_a_resumed_merge_is_the_same(
    tmp_path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Adapters(tmp_path)
    recipe = case.recipe(case.whole, "wudi", **parameters)
    api.merge(recipe, tmp_path / "whole", memory="600MiB", threads=2)
    add, left = Journal.add, [2]

    def counted(self: Journal, name: str, record: Any) -> None:
        if left[0] == 0:
            raise Unplugged
        left[0] -= 1
        add(self, name, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", counted)
        with pytest.raises(Unplugged):
            api.merge(recipe, tmp_path / "out", memory="440MiB", threads=1)
    assert api.merge(recipe, tmp_path / "out", memory="2GiB", threads=3).num_resumed == 2
    names = ("whole", "out")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in names)
    assert first == second


def test_defaults_are_those_of_the_authors() -> None:
    spec = get_method("wudi").spec
    assert spec.parameters["steps"].default == 300
    assert spec.parameters["lr"].default == 1e-5
    assert spec.presets["official_llm"] == {"lr": 2e-5}
