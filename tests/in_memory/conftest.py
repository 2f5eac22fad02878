"""Small torch models, their folders, and what a merge of the folders gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pymerge
from pymerge.methods import METHODS

#: Matrices have more elements than a span, so that they can be cut into tiles.
WIDTH, VOCABULARY = 64, 100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks between an embedding and a head, and a buffer of whole numbers."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_net(seed: int, *, tied: bool = False) -> Net:
    """Net 0 is the base, others are it with something added."""
    torch.manual_seed(1234)
    net = Net(tied)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.05 if seed else 0.0)
    return net


@dataclass
class Nets:
    """A base and three models made of it, as modules, folders and statistics of the folders."""

    root: Path
    base: Net
    models: list[Net]
    statistics: dict[str, list[dict[str, torch.Tensor]]]

    @property
    def folders(self) -> list[Path]:
        return [self.root / f"model{number}" for number in range(len(self.models))]


def save(net: nn.Module, folder: Path) -> None:
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "net"}))


def collect(net: Net, folder: Path, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Statistics as they are saved, by the weights' names."""
    torch.manual_seed(seed)
    with pymerge.collect(net, kind=kind) as collector:
        for _ in range(3):
            logits = net(torch.randint(VOCABULARY, (32,)))
            if kind == "fisher":
                collector.backward(logits)
    collector.save(folder)
    stored = load_file(folder / "pymerge-statistics" / f"{kind}.safetensors")
    return {name: tensor for name, tensor in stored.items() if name in dict(net.named_parameters())}


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    root = tmp_path_factory.mktemp("nets")
    found = Nets(root, make_net(0), [make_net(seed) for seed in (1, 2, 3)], {})
    save(found.base, root / "base")
    for net, folder in zip(found.models, found.folders, strict=True):
        save(net, folder)
    for kind in ("gram", "fisher"):
        found.statistics[kind] = [
            collect(net, folder, kind, seed)
            for seed, (net, folder) in enumerate(zip(found.models, found.folders, strict=True))
        ]
    return found


@dataclass
class Case:
    """One method with parameters that make it do something; ``per_model`` are lists."""

    method: str
    parameters: dict[str, Any]

    @property
    def num_models(self) -> int:
        return min(3, METHODS[self.method].spec.max_models or 3)

    @property
    def takes_base(self) -> bool:
        return METHODS[self.method].spec.base == "required"

    def call(self, nets: Nets) -> dict[str, Any]:
        """The arguments of a call beside base and models."""
        kind = METHODS[self.method].reads
        given = {"statistics": nets.statistics[kind][: self.num_models]} if kind else {}
        return {"method": self.method, **given, **self.parameters}

    def recipe(self, nets: Nets, **keys: Any) -> dict[str, Any]:
        models: list[dict[str, Any]] = []
        for number in range(self.num_models):
            own = {k: v[number] for k, v in self.parameters.items() if isinstance(v, list)}
            models.append({"model": str(nets.folders[number]), "parameters": own})
        shared = {k.rstrip("_"): v for k, v in self.parameters.items() if not isinstance(v, list)}
        found = {"merge_method": self.method, "models": models, "parameters": shared, **keys}
        if self.takes_base:
            found["base_model"] = str(nets.root / "base")
        return found

    def through_files(self, nets: Nets, out: Path, **options: Any) -> dict[str, torch.Tensor]:
        keys = {key: options.pop(key) for key in ("dtype", "out_dtype") if key in options}
        pymerge.merge(self.recipe(nets, **keys), out, **options)
        found: dict[str, torch.Tensor] = {}
        for file in sorted(out.glob("*.safetensors")):
            found |= load_file(file)
        return found


WEIGHTS = {"weight": [0.7, 0.4, 0.9]}

CASES = [
    Case("arcee_fusion", {}),
    Case("breadcrumbs", {**WEIGHTS, "density": 0.7, "gamma": 0.05}),
    Case("breadcrumbs_ties", {**WEIGHTS, "density": 0.7, "gamma": 0.05, "rescale": True}),
    Case("consensus_ta", {}),
    Case("dare_linear", {**WEIGHTS, "density": 0.6, "seed": 7}),
    Case("dare_ties", {**WEIGHTS, "density": 0.6}),
    Case("della", {**WEIGHTS, "density": 0.6, "epsilon": 0.1}),
    Case("della_linear", {**WEIGHTS, "density": 0.6, "epsilon": 0.1}),
    Case("doge_ta", {"steps": 5}),
    Case("fisher", {}),
    Case("iso_c", {}),
    Case("iso_cts", {}),
    Case("karcher", {}),
    Case("knots", {}),
    Case("linear", WEIGHTS),
    Case("lore", {"iterations": 3, "lambda_": 0.7}),
    Case("magmax", {}),
    Case("model_stock", {}),
    Case("model_stock", {"filter_wise": True}),
    Case("multislerp", WEIGHTS),
    Case("nearswap", {"t": 0.01}),
    Case("nuslerp", {"weight": [0.7, 0.4]}),
    Case("opcm", {}),
    Case("optmerge", {}),
    Case("passthrough", {"scale": [0.5]}),
    Case("passthrough", {}),
    Case("pcb", {"ratio": 0.3}),
    Case("pcb", {"ratio": 0.3, "scope": "tensor"}),
    Case("ram", {}),
    Case("ramplus_tl", {}),
    Case("ramplus_tl", {"preset": "official"}),
    Case("regmean", {}),
    Case("sce", {"select_topk": 0.4}),
    Case("slerp", {"t": 0.3}),
    Case("task_arithmetic", {**WEIGHTS, "lambda_": 0.7}),
    Case("ties", {**WEIGHTS, "density": 0.3}),
    Case("ties", {**WEIGHTS, "density": 0.3, "trim_scope": "model"}),
    Case("ties", {"preset": "official"}),
    Case("ties", {**WEIGHTS, "density": 0.3, "zero_sign": "majority", "rescale": True}),
    Case("tsv_m", {}),
    Case("wudi", {"steps": 5}),
]


def case_id(case: Case) -> str:
    words = [str(v) for k, v in case.parameters.items() if isinstance(v, (str, bool))]
    return "-".join([case.method, *words])


def same_bytes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        ours = found[name].detach().contiguous().reshape(-1).view(torch.uint8)
        assert ours.equal(tensor.contiguous().reshape(-1).view(torch.uint8)), name


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return CASES


@pytest.fixture(scope="session")
def assert_same_bytes() -> Any:
    return same_bytes


@pytest.fixture(scope="session")
def net() -> Any:
    return make_net
