"""Mixtures of experts: each expert is merged as its own matrix, in whatever layout it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge import api
from pymerge.checkpoint import MANIFEST_NAME
from pymerge.engine.output import Output
from pymerge.errors import CheckpointError, PlanError
from pymerge.report.groups import grouped

EXPERTS, INNER, WIDTH = 4, 24, 40
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
WEIGHTS = (0.4, 0.7)
Tensors = dict[str, torch.Tensor]


def packed(seed: int) -> Tensors:
    """A layer of packed experts, each of another magnitude, in float32: 0 is the base, others are
    fine-tunes of it."""
    tensors = {}
    for number in (0, seed):
        torch.manual_seed(number)
        size = 10.0 ** torch.arange(EXPERTS).reshape(-1, 1, 1) * (1 if number == 0 else 0.1)
        change = {
            GATE_UP: torch.randn(EXPERTS, 2 * INNER, WIDTH) * size,
            DOWN: torch.randn(EXPERTS, WIDTH, INNER) * size,
            "model.layers.0.mlp.gate.weight": torch.randn(EXPERTS, WIDTH),
            "model.layers.0.self_attn.q_proj.weight": torch.randn(WIDTH, WIDTH),
            "model.norm.weight": torch.randn(WIDTH),
        }
        tensors = {name: tensors.get(name, 0) + each for name, each in change.items()}
        if seed == 0:
            break
    return tensors


def unpacked(tensors: Tensors, style: str = "qwen") -> Tensors:
    """The same with a tensor for each expert, as transformers writes Qwen3-MoE or Mixtral."""
    gate, up, down = (
        ("gate_proj", "up_proj", "down_proj") if style == "qwen" else ("w1", "w3", "w2")
    )
    block = "mlp" if style == "qwen" else "block_sparse_moe"
    found = {}
    for name, tensor in tensors.items():
        if name == GATE_UP:
            for i in range(EXPERTS):
                prefix = f"model.layers.0.{block}.experts.{i}."
                found[f"{prefix}{gate}.weight"] = tensor[i, :INNER].clone()
                found[f"{prefix}{up}.weight"] = tensor[i, INNER:].clone()
                found[f"{prefix}{down}.weight"] = tensors[DOWN][i].clone()
        elif name != DOWN:
            found[name.replace(".mlp.", f".{block}.")] = tensor
    return found


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "torch_dtype": "float32", **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def ties(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """Yadav et al. 2023 in float64, as mergekit normalises it."""
    kept = []
    for model in models:
        delta = (model - base).double()
        k = int(0.3 * delta.numel())
        threshold = delta.abs().flatten().kthvalue(delta.numel() - k + 1).values
        kept.append(delta * (delta.abs() >= threshold))
    weights = torch.tensor(WEIGHTS).double()
    stack = torch.stack([w * delta for w, delta in zip(weights, kept, strict=True)])
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    mask = torch.stack([delta.sign() for delta in kept]) == sign
    divisor = (weights.reshape(-1, *[1] * base.dim()) * mask).sum(0)
    total = (stack * mask).sum(0) / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return base.double() + total


def linear(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    return sum(w * m.double() for w, m in zip(WEIGHTS, models, strict=True)) / sum(WEIGHTS)


def task_arithmetic(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    deltas = [w * (m - base).double() for w, m in zip(WEIGHTS, models, strict=True)]
    return base.double() + sum(deltas)


def iso_c(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """Marczak et al. 2025, equation 6, in float64; what is no matrix by the mean."""
    if base.dim() < 2:
        return base.double() + sum((m - base).double() for m in models) / len(models)
    total = sum(w * (m - base).double() for w, m in zip(WEIGHTS, models, strict=True))
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return base.double() + s.mean() * u @ v


METHODS: dict[str, tuple[Callable[..., torch.Tensor], float]] = {
    "ties": (ties, 3e-7),
    "linear": (linear, 3e-7),
    "task_arithmetic": (task_arithmetic, 3e-7),
    "iso_c": (iso_c, 2e-5),
}


def recipe(method: str, base: Path, models: list[Path]) -> dict[str, Any]:
    density = {"density": 0.3} if method == "ties" else {}
    listed = [
        {"model": str(path), "parameters": {"weight": weight, **density}}
        for path, weight in zip(models, WEIGHTS, strict=True)
    ]
    found: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "float32"}
    return found if method == "linear" else {**found, "base_model": str(base)}


def reference(method: str, layout: Callable[[Tensors], Tensors] = dict) -> Tensors:
    """Each matrix merged by itself."""
    merge, _ = METHODS[method]
    base, *models = (layout(packed(seed)) for seed in range(3))
    found = {}
    for name, tensor in base.items():
        if tensor.dim() == 3:
            each = [merge(tensor[i], [m[name][i] for m in models]) for i in range(EXPERTS)]
            found[name] = torch.stack(each)
        else:
            found[name] = merge(tensor, [m[name] for m in models])
    return found


def check(out: Path, expected: Tensors, tolerance: float) -> None:
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        matrices = tensor if tensor.dim() == 3 else [tensor]
        parts = found[name] if tensor.dim() == 3 else [found[name]]
        assert found[name].shape == tensor.shape
        for matrix, part in zip(matrices, parts, strict=True):
            worst = (part.double() - matrix).abs().max() / matrix.abs().max()
            assert worst < tolerance, f"{name}: {worst}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Base and two fine-tunes in each layout."""
    folder = tmp_path_factory.mktemp("experts")
    layouts = {
        "packed": dict,
        "qwen": unpacked,
        "mixtral": lambda tensors: unpacked(tensors, "mixtral"),
    }
    return {
        name: [save(folder / name / str(seed), layout(packed(seed))) for seed in range(3)]
        for name, layout in layouts.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_each_packed_expert_is_a_matrix_of_its_own(models, tmp_path, method):
    base, *tuned = models["packed"]
    api.merge(recipe(method, base, tuned), tmp_path / "out")
    check(tmp_path / "out", reference(method), METHODS[method][1])
    assert not api.verify(tmp_path / "out").problems


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("style", ["qwen", "mixtral"])
def test_unpacked_experts_stay_unpacked(models, tmp_path, method, style):
    base, *tuned = models[style]
    api.merge(recipe(method, base, tuned), tmp_path / "out")
    expected = reference(method, lambda tensors: unpacked(tensors, style))
    check(tmp_path / "out", expected, METHODS[method][1])


@pytest.mark.parametrize("style", ["qwen", "mixtral"])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_a_model_of_the_other_layout_gives_the_same_bytes(models, tmp_path, style, method):
    for donor, other in (("packed", style), (style, "packed")):
        base, one, two = models[donor]
        expected, found = tmp_path / f"{donor}-alike", tmp_path / f"{donor}-mixed"
        api.merge(recipe(method, base, [one, two]), expected)
        api.merge(recipe(method, base, [one, models[other][2]]), found)
        name = "model.safetensors"
        assert (expected / name).read_bytes() == (found / name).read_bytes()


def test_mergekit_numerics_take_packed_experts_whole(models):
    base, *tuned = models["packed"]
    plan = api.plan(recipe("ties", base, tuned), numerics="mergekit")
    assert {job.name for job in plan.jobs} == packed(0).keys()
    assert all(job.piece is None for job in plan.jobs)


def test_a_map_of_elements_takes_packed_experts_whole(models):
    base, *tuned = models["packed"]
    plan = api.plan(recipe("task_arithmetic", base, tuned))
    assert len(plan.jobs) == plan.num_tensors == len(packed(0))


def test_the_plan_counts_tensors_and_names_experts(models):
    base, *tuned = models["packed"]
    plan = api.plan(recipe("ties", base, tuned))
    assert plan.num_tensors == 5
    assert len(plan.jobs) == 5 - 2 + 2 * EXPERTS
    pieces = plan.jobs_of_tensors[DOWN]
    assert [job.name for job in pieces] == [f"{DOWN}[{i}]" for i in range(EXPERTS)]
    offset, num_bytes = plan.shards[0].tensors[DOWN]
    assert [job.offset for job in pieces] == [
        offset + i * num_bytes // EXPERTS for i in range(EXPERTS)
    ]


def test_an_interrupted_merge_goes_on_within_a_tensor(models, tmp_path, monkeypatch):
    base, *tuned = models["packed"]
    plan = api.plan(recipe("ties", base, tuned))
    api.merge(plan, tmp_path / "whole")
    finish = Output.finish

    def fail(self, job, record):
        if job.name == f"{DOWN}[2]":
            raise RuntimeError("stopped here")
        return finish(self, job, record)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", fail)
        with pytest.raises(RuntimeError, match="stopped here"):
            api.merge(plan, tmp_path / "out")
    journal = (tmp_path / "out" / ".pymerge-journal").read_text()
    assert f'"{DOWN}[1]"' in journal
    report = api.merge(plan, tmp_path / "out")
    assert report.num_tensors == 5
    assert report.num_resumed < 5
    assert report.bytes_read < plan.bytes_read
    for name in ("model.safetensors", MANIFEST_NAME):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_non_finite_elements_are_counted_by_tensor(models, tmp_path):
    tensors = packed(1)
    tensors[GATE_UP][1, 3, 5] = torch.nan
    tensors[GATE_UP][3, 0, 0] = torch.inf
    broken = save(tmp_path / "broken", tensors)
    base, _, two = models["packed"]
    report = api.merge(
        recipe("task_arithmetic", base, [broken, two]),
        tmp_path / "out",
    )
    assert report.nonfinite == {GATE_UP: 2}
    report = api.merge(recipe("ties", base, [broken, two]), tmp_path / "ties")
    assert set(report.nonfinite) == {GATE_UP}


def test_a_layout_that_is_not_known_is_refused(models, tmp_path):
    """gpt-oss packs [experts, inputs, outputs], gate and up turn by turn."""
    tensors = packed(0)
    tensors[GATE_UP] = tensors[GATE_UP].transpose(1, 2).contiguous()
    base = save(tmp_path / "base", tensors, model_type="gpt_oss")
    with pytest.raises(CheckpointError, match=r"gate and up one after the other"):
        api.plan(recipe("ties", base, models["qwen"][1:]))
    short = {n: t for n, t in unpacked(packed(1)).items() if ".experts.3." not in n}
    fewer = save(tmp_path / "fewer", short)
    with pytest.raises((CheckpointError, PlanError), match="experts"):
        api.plan(recipe("ties", models["packed"][0], [fewer, models["packed"][2]]))


def test_patterns_are_for_the_names_of_whole_tensors(models):
    base, *tuned = models["packed"]
    asked = recipe("tsv_m", base, tuned)
    asked["parameters"] = {**asked.get("parameters", {}), "layers": r"down_proj$"}
    plan = api.plan(asked, strict=True)
    assert {job.tensor_name for job in plan.jobs if job.cost.num_bytes} == {DOWN}


def test_an_explanation_counts_packed_experts_as_one_tensor(models):
    base, *tuned = models["packed"]
    found = api.explain(recipe("ties", base, tuned))
    assert found.num_tensors == 5
    assert len({each.tensor for each in found.tensors}) == 5
    assert len(found.tensors) == 5 - 2 + 2 * EXPERTS
    (group, *_) = [
        each for each in grouped(found.tensors) if DOWN in {t.tensor for t in each.tensors}
    ]
    assert f"down_proj[{{0-{EXPERTS - 1}}}]" in " ".join(group.names)
    experts = api.explain(recipe("ties", base, tuned), DOWN).tensors
    assert [each.name for each in experts] == [f"{DOWN}[{i}]" for i in range(EXPERTS)]


def test_a_survey_draws_the_packed_experts_of_a_layer_together(models, tmp_path):
    base, *tuned = models["packed"]
    api.merge(recipe("ties", base, tuned), tmp_path / "out")
    modules = pymerge.survey(tmp_path / "out").modules
    assert modules["mlp.experts.down_proj[*]"].num_tensors == EXPERTS
