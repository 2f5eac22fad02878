"""Numerics mergekit against mergekit 0.1.5 itself on one torch thread: the same bytes.

Sorting leaves open which of several equal magnitudes come first, and mergekit's sort is not stable.
So where ties and breadcrumbs keep only some of the elements that share a magnitude with the last
one kept, those elements may differ, and no others. They are computed here from the inputs: see
:func:`open_elements`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_checkpoints import llama_shapes, write_llama
from mergekit_runs import Case, Outcome, differing, run_both, tensors_of

SEED = 1234
MODELS = ("a", "b", "c", "d", "e", "f")
SUFFIXES = {"": torch.float32, "-bf16": torch.bfloat16, "-f16": torch.float16}


@dataclass(frozen=True)
class Way:
    """A method with its parameters. ``models`` has those of each model; they are named a, b, ..."""

    method: str
    models: tuple[Mapping[str, object], ...]
    shared: str = "{}"
    base: bool = True

    def recipe(self, suffixes: tuple[str, ...] = ("",), tail: str = "") -> str:
        """The suffixes are those of the base and the models in turn."""
        names = [
            f"{{{MODELS[i]}{suffixes[(i + 1) % len(suffixes)]}}}" for i in range(9)[: self.num]
        ]
        lines = [f"merge_method: {self.method}", "models:"]
        for name, values in zip(names, self.models, strict=True):
            shown = ", ".join(f"{key}: {value}" for key, value in values.items())
            lines.append(f"  - {{model: {name}, parameters: {{{shown}}}}}")
        if self.base:
            lines.append(f"base_model: {{base{suffixes[0]}}}")
        return "\n".join([*lines, f"parameters: {self.shared}", tail])

    @property
    def num(self) -> int:
        return len(self.models)


def weights(*values: float, **others: float) -> tuple[Mapping[str, object], ...]:
    return tuple({"weight": value, **others} for value in values)


def densities(**lists: tuple[float, ...]) -> tuple[Mapping[str, object], ...]:
    return tuple(dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))


SIX = (0.3, 0.7, -0.2, 0.55, 0.125, 0.9)
WAYS = {
    "linear": Way("linear", weights(0.3, 0.5, 0.9), base=False),
    "linear-six": Way("linear", weights(*SIX), base=False),
    "linear-sum": Way("linear", weights(0.3, 0.5), "{normalize: false}", base=False),
    "slerp": Way("slerp", ({},), "{t: 0.3}"),
    "slerp-filtered": Way("slerp", ({},), "{t: [{filter: mlp, value: 0.7}, {value: 1.2}]}"),
    "nuslerp": Way("nuslerp", weights(0.4, 0.9)),
    "nuslerp-no-base": Way("nuslerp", weights(0.4, 0.9), base=False),
    "nuslerp-by-row": Way("nuslerp", weights(0.4, 0.9), "{nuslerp_flatten: false}"),
    "nuslerp-by-column": Way(
        "nuslerp",
        weights(0.4, 0.9),
        "{nuslerp_flatten: false, nuslerp_row_wise: true}",
        base=False,
    ),
    "multislerp": Way("multislerp", weights(0.4, 0.9, 0.2)),
    "multislerp-six": Way("multislerp", weights(*SIX), base=False),
    "multislerp-raw": Way("multislerp", weights(0.4, 0.9), "{normalize_weights: false}"),
    "multislerp-one": Way("multislerp", weights(0.4)),
    "karcher": Way("karcher", ({}, {}, {}), base=False),
    "karcher-three-steps": Way("karcher", ({},) * 6, "{max_iter: 3, tol: 1e-9}", base=False),
    "passthrough": Way("passthrough", ({"scale": 0.3},), base=False),
    "passthrough-copy": Way("passthrough", ({},), base=False),
    "task_arithmetic": Way("task_arithmetic", weights(0.3, 0.7, -0.2), "{lambda: 0.8}"),
    "task_arithmetic-six": Way("task_arithmetic", weights(*SIX), "{normalize: true}"),
    "ties": Way("ties", densities(weight=(1.0, 0.7, 0.4), density=(0.2, 0.5, 0.8))),
    "ties-six": Way("ties", densities(weight=SIX, density=(0.2, 0.5, 0.8, 1.0, 0.0, 0.33))),
    "ties-sum": Way("ties", weights(1.0, -0.5, density=0.3), "{normalize: false, lambda: 0.6}"),
    "ties-rescaled": Way("ties", weights(1.0, 0.5, density=0.3), "{rescale: true}"),
    "breadcrumbs": Way("breadcrumbs", weights(0.4, 0.7, 0.2, density=0.6, gamma=0.02)),
    "breadcrumbs-full": Way("breadcrumbs", weights(0.4, 0.7, density=0.97, gamma=0.1)),
    "breadcrumbs_ties": Way("breadcrumbs_ties", weights(0.4, 0.7, 0.2, density=0.9)),
    "dare_linear": Way("dare_linear", weights(0.4, 0.7, 0.2, density=0.6)),
    "dare_linear-no-rescale": Way("dare_linear", weights(0.4, density=0.3), "{rescale: false}"),
    "dare_ties": Way("dare_ties", densities(weight=(1.0, 0.7, 0.4), density=(0.2, 1.0, 0.8))),
    "dare_ties-six": Way("dare_ties", weights(*SIX, density=0.5), "{normalize: true}"),
    "dare-filtered": Way(
        "dare_ties",
        ({"weight": 0.5, "density": "[{filter: mlp, value: 0.4}, {value: 1.0}]"},) * 2,
        "{lambda: 1.1}",
    ),
    "della": Way("della", weights(0.4, 0.7, 0.2, density=0.6)),
    "della-wide": Way("della", weights(0.4, 0.7, density=0.5, epsilon=0.4), "{lambda: 1.2}"),
    "della_linear": Way("della_linear", densities(weight=(1.0, 0.7), density=(0.5, 1.0))),
    "della_linear-no-rescale": Way(
        "della_linear", weights(0.4, 0.7, density=0.6), "{rescale: false}"
    ),
    "model_stock": Way("model_stock", ({}, {}, {})),
    "model_stock-by-row": Way("model_stock", ({}, {}), "{filter_wise: true}"),
    "nearswap": Way("nearswap", ({},), "{t: 0.001}"),
    "sce": Way("sce", ({}, {}, {})),
    "sce-top": Way("sce", ({}, {}, {}), "{select_topk: 0.3}"),
    "sce-six": Way("sce", ({},) * 6, "{select_topk: 0.8}"),
    "ram": Way("ram", ({}, {}, {}), "{epsilon: 0.002}"),
    "ram-six": Way("ram", ({},) * 6, "{epsilon: 0.001}"),
    "ramplus_tl": Way("ramplus_tl", ({}, {}, {}), "{epsilon: 0.002, r: 0.3, alpha: 0.5}"),
    "arcee_fusion": Way("arcee_fusion", ({},)),
}
#: Suffixes of base and models, the end of the recipe, and the format that it computes in.
REGIMES = {
    "float32": (("",), ""),
    "bfloat16": (("-bf16",), ""),
    "float16": (("-f16",), ""),
    "to-bfloat16": (("",), "dtype: bfloat16"),
    "to-float16": (("-bf16",), "dtype: float16"),
    "out-bfloat16": (("-bf16",), "dtype: float32\nout_dtype: bfloat16"),
    "out-float32": (("", "-bf16"), "dtype: bfloat16\nout_dtype: float32"),
    "mixed": (("-bf16", "-f16", "-bf16"), ""),
}
#: In the other regimes one way of each method is enough.
OFTEN = ("float32", "bfloat16")
EXTRA = ("passthrough-copy-out-float32", "ties-rescaled-float16")
CASES = {
    f"{way}-{regime}": Case(
        WAYS[way].recipe(*REGIMES[regime]), {"random_seed": SEED}, {"random_seed": SEED}
    )
    for regime in REGIMES
    for way in WAYS
    if regime in OFTEN or way == WAYS[way].method or f"{way}-{regime}" in EXTRA
}
#: The others take minutes.
OFTEN_CASES = {
    name: case
    for name, case in CASES.items()
    if (name.endswith("-bfloat16") and "-to-" not in name and "-out-" not in name)
    or name.removesuffix("-float32") in {way.method for way in WAYS.values()}
}
LARGE = ("slerp", "arcee_fusion", "dare_linear", "task_arithmetic-six")
#: Methods whose result mergekit leaves in float32.
WIDER = ("ramplus_tl", "arcee_fusion")


def deltas_around(
    shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    return {name: rng.normal(0, 2e-3, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two layers in every format."""
    return write_family(tmp_path_factory.mktemp("family"), llama_shapes(2, tied=False), SUFFIXES)


@pytest.fixture(scope="module")
def outcomes(
    peers_python: Path, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """The cases that every test run goes through."""
    return run_both(peers_python, family.iterdir(), OFTEN_CASES, tmp_path_factory.mktemp("often"))


@pytest.fixture(scope="module")
def further_outcomes(
    peers_python: Path, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    cases = {name: case for name, case in CASES.items() if name not in OFTEN_CASES}
    return run_both(peers_python, family.iterdir(), cases, tmp_path_factory.mktemp("further"))


@pytest.fixture(scope="module")
def large_outcomes(
    peers_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Cases with a tensor of more than 2^20 elements, which slerp measures by chunks and
    arcee_fusion by a sample."""
    shapes = {**llama_shapes(1, tied=True), "model.embed_tokens.weight": (16421, 64)}
    suffixes = {"": torch.float32, "-bf16": torch.bfloat16}
    large = write_family(tmp_path_factory.mktemp("large"), shapes, suffixes)
    cases = {f"{way}-{regime}": CASES[f"{way}-{regime}"] for way in LARGE for regime in OFTEN}
    return run_both(peers_python, large.iterdir(), cases, tmp_path_factory.mktemp("outputs"))


def write_family(
    root: Path, shapes: Mapping[str, tuple[int, ...]], suffixes: Mapping[str, torch.dtype]
) -> Path:
    rng = np.random.default_rng(5)
    base = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if "layers" in name)
    for model in ("base", *MODELS):
        change = deltas_around(shapes, rng) if model != "base" else {}
        for suffix, dtype in suffixes.items():
            tensors = {
                name: torch.from_numpy(value + change.get(name, np.float32(0))).to(dtype)
                for name, value in base.items()
            }
            write_llama(root / f"{model}{suffix}", tensors, layers, "lm_head.weight" not in shapes)
    return root


def open_elements(way: Way, outcome: Outcome, regime: str) -> dict[str, torch.Tensor]:
    """Elements that share the magnitude of the last one kept (or, of breadcrumbs, dropped) with
    others on its other side, in any model's rounded task vector; from the inputs and the document
    alone."""
    inputs = {name: tensors_of(path) for name, path in outcome.inputs.items()}
    base = next(tensors for name, tensors in inputs.items() if name.startswith("base"))
    models = [inputs[name] for letter in MODELS for name in inputs if name.split("-")[0] == letter]
    tail = REGIMES[regime][1]
    found = {}
    for name, origin in base.items():
        kinds = [origin.dtype, *(model[name].dtype for model in models)]
        dtype = kinds[0]
        for kind in kinds[1:]:
            dtype = torch.promote_types(dtype, kind)
        if tail.startswith("dtype: "):
            dtype = getattr(torch, tail.split()[1])
        mask = torch.zeros(origin.shape, dtype=torch.bool)
        for model, values in zip(models, way.models, strict=True):
            size = (model[name].to(dtype) - origin.to(dtype)).abs().float()
            ordered = size.flatten().sort(descending=True).values
            n, density = size.numel(), float(str(values.get("density", 1.0)))
            kept = max(1, int(density * n)) if way.method == "ties" else int(density * n)
            dropped = min(int(float(str(values.get("gamma", 0.01))) * n), n - kept)
            dropped = 0 if way.method == "ties" else dropped
            for end in (dropped, dropped + kept):
                if density < 1 and 0 < end < n and ordered[end - 1] == ordered[end]:
                    mask |= size == ordered[end]
        found[name] = mask
    return found


def check(case: str, outcome: Outcome) -> None:
    """The same bytes in all elements that sorting does not leave open."""
    way, regime = split(case)
    wrong = differing(outcome, rounded=WAYS[way].method in WIDER)
    if WAYS[way].method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        for name, excused in open_elements(WAYS[way], outcome, regime).items():
            wrong[name] &= ~excused
    assert not {name: int(mask.sum()) for name, mask in wrong.items() if mask.any()}


def split(case: str) -> tuple[str, str]:
    """The way and the regime of a case."""
    regime = max((each for each in REGIMES if case.endswith(f"-{each}")), key=len)
    return case.removesuffix(f"-{regime}"), regime


@pytest.mark.parametrize("case", OFTEN_CASES)
def test_the_same_bytes_as_mergekit(outcomes: dict[str, Outcome], case: str) -> None:
    check(case, outcomes[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in OFTEN_CASES])
def test_the_same_bytes_in_every_regime(further_outcomes: dict[str, Outcome], case: str) -> None:
    check(case, further_outcomes[case])


@pytest.mark.slow
@pytest.mark.parametrize("way", LARGE)
@pytest.mark.parametrize("regime", OFTEN)
def test_the_same_bytes_of_large_tensors(
    large_outcomes: dict[str, Outcome], way: str, regime: str
) -> None:
    check(f"{way}-{regime}", large_outcomes[f"{way}-{regime}"])


@pytest.mark.parametrize("case", ["ties-float32", "breadcrumbs-float32"])
def test_float32_leaves_nothing_open(outcomes: dict[str, Outcome], case: str) -> None:
    """So that the comparison of these cases is one of all elements."""
    way, regime = split(case)
    found = open_elements(WAYS[way], outcomes[case], regime)
    assert not any(mask.any() for mask in found.values())
