"""Combination of adapters: what is written, against the sum of the updates in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.adapter_config import read_adapter_config
from pymerge.errors import CheckpointError, PlanError, PymergeError
from pymerge.lora.combine import METHODS
from pymerge.lora.factor_methods import Low, robust_merge

Q, UP, WORDS, CONV = "model.q_proj", "model.up_proj", "model.embed_tokens", "model.conv"
SIZES = {Q: (12, 12), UP: (20, 12), WORDS: (12, 30)}


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter of these ranks; returns its folder."""

    def write(name, ranks=None, seed=0, dtype=torch.float32, extra=None, **config):
        ranks = {Q: 3, UP: 3, WORDS: 3} if ranks is None else ranks
        rng = np.random.default_rng(seed)
        tensors = dict(extra or {})
        for module, rank in ranks.items():
            num_out, num_in = SIZES[module]
            kind, end = ("lora", ".weight") if module != WORDS else ("lora_embedding", "")
            for letter, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
                value = torch.from_numpy(rng.normal(size=shape)).to(dtype)
                tensors[f"base_model.model.{module}.{kind}_{letter}{end}"] = value
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        fields = {
            "peft_type": "LORA",
            "base_model_name_or_path": "some/base",
            "task_type": "CAUSAL_LM",
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "up_proj", "embed_tokens"],
            **config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder

    return write


def factors(folder, module):
    """A, B in float64 and the scale, as the configuration has it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    kind, end = ("lora", ".weight") if module != WORDS else ("lora_embedding", "")
    start = f"base_model.model.{module}.{kind}_"
    if f"{start}A{end}" not in tensors:
        return None
    config = read_adapter_config(folder)
    a, b = (tensors[f"{start}{letter}{end}"].double() for letter in "AB")
    return a.numpy(), b.numpy(), config.scale_of(module)


def delta(folder, module):
    found = factors(folder, module)
    return np.zeros(SIZES[module]) if found is None else found[2] * found[1] @ found[0]


def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


VARIED = {
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"model.q_proj": 5},
    "use_rslora": True,
}


@pytest.fixture
def three(adapter):
    """Adapters of several ranks and scales; the last has no up_proj."""
    return [
        adapter("one"),
        adapter("two", {Q: 3, UP: 2, WORDS: 3}, seed=1, **VARIED),
        adapter("three", {Q: 5, WORDS: 1}, seed=2, r=5, rank_pattern={"embed_tokens": 1}),
    ]


WEIGHTS = [0.5, -1.5, 2.0]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_sums_are_exact(three, tmp_path, method):
    """Without truncation both are the sum, to the rounding of float32 factors."""
    options = {"energy": 1.0} if method == "svd" else {}
    report = pymerge.combine_lora(
        three, tmp_path / "out", method=method, weights=WEIGHTS, **options
    )
    ranks = {module.name: module.rank for module in report.modules}
    full = {Q: 11, UP: 5, WORDS: 7}
    assert ranks == full
    for module in SIZES:
        truth = sum(w * delta(each, module) for w, each in zip(WEIGHTS, three, strict=True))
        assert relative(delta(tmp_path / "out", module), truth) < 3e-7
        assert factors(tmp_path / "out", module)[2] == 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["embed_tokens", "q_proj", "up_proj"]


@pytest.mark.parametrize("rank", [1, 2, 4, 40])
def test_svd_is_that_of_the_dense_sum(three, tmp_path, rank):
    """Equal to the best approximation of the sum in float64, and as far from the sum."""
    report = pymerge.combine_lora(three, tmp_path / "out", weights=WEIGHTS, rank=rank)
    for module in report.modules:
        truth = sum(w * delta(each, module.name) for w, each in zip(WEIGHTS, three, strict=True))
        u, s, vt = np.linalg.svd(truth)
        best = u[:, :rank] * s[:rank] @ vt[:rank] if rank < len(s) else truth
        assert relative(delta(tmp_path / "out", module.name), best) < 1e-6
        assert abs(module.energy - (s[:rank] ** 2).sum() / (s**2).sum()) < 1e-12
        assert module.rank == min(rank, int((s > 1e-10 * s[0]).sum()))


def test_svd_keeps_the_largest_rank_by_default(three, tmp_path):
    report = pymerge.combine_lora(three, tmp_path / "out")
    assert {m.name: m.rank for m in report.modules} == {Q: 5, UP: 3, WORDS: 3}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_svd_by_energy(three, tmp_path, energy):
    report = pymerge.combine_lora(three, tmp_path / "out", energy=energy)
    for module in report.modules:
        values = np.linalg.svd(sum(delta(e, module.name) for e in three), compute_uv=False) ** 2
        held = values.cumsum() / values.sum()
        assert module.rank == int(np.argmax(held >= energy)) + 1
        assert module.energy >= energy


def test_updates_that_cancel(adapter, tmp_path):
    one = adapter("one")
    report = pymerge.combine_lora([one, one], tmp_path / "out", weights=[1, -1])
    assert {module.rank for module in report.modules} == {1}
    for module in SIZES:
        assert not delta(tmp_path / "out", module).any()


def test_one_adapter_cut_to_a_lower_rank(adapter, tmp_path):
    one = adapter("one")
    pymerge.combine_lora([one], tmp_path / "out", rank=2)
    for module in SIZES:
        u, s, vt = np.linalg.svd(delta(one, module))
        best = u[:, :2] * s[:2] @ vt[:2]
        assert relative(delta(tmp_path / "out", module), best) < 1e-6


def test_linear_sums_the_factors(adapter, tmp_path):
    folders = [adapter("one"), adapter("two", seed=1, lora_alpha=12)]
    weights = [0.25, -2.0]
    pymerge.combine_lora(folders, tmp_path / "out", method="linear", weights=weights)
    for module in SIZES:
        a = b = 0
        for weight, folder in zip(weights, folders, strict=True):
            each_a, each_b, scale = factors(folder, module)
            root = math.sqrt(abs(weight * scale))
            a, b = a + math.copysign(root, weight) * each_a, b + root * each_b
        found = factors(tmp_path / "out", module)
        np.testing.assert_allclose(found[0], a, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found[1], b, rtol=1e-7, atol=1e-7)
        assert found[2] == 1


def official_robust_merge(adapters):
    """The released code's steps on stacked factors [T, rows, columns], in float64."""
    stacks = [np.stack([each[index] for each in adapters]) for index in range(2)]
    trimmed = []
    for stack in stacks:
        flat = np.sort(np.abs(stack).reshape(len(stack), -1), axis=1)
        place = int(stack[0].size * 0.8)
        trimmed.append(np.where(np.abs(stack) >= flat[:, place - 1, None, None], stack, 0))
    scale = np.abs(stacks[0]).sum(-1) / np.abs(trimmed[0]).sum(-1)
    ordered = np.sort(scale, axis=1)
    floor = ordered[:, int(scale.shape[1] * 0.8)]
    scale = np.clip(scale, floor[:, None], ordered[:, -1:])
    a = (2 * trimmed[0]).sum(0)
    b = (2 * scale[:, None] * trimmed[1]).sum(0) / scale[:, None].sum(0)
    return a, b


@pytest.mark.parametrize("num", [1, 2, 5])
def test_robust_merge_is_the_released_code(adapter, tmp_path, monkeypatch, num):
    """Of rows so long that trimming leaves something of each."""
    for module, size in ((Q, (64, 64)), (UP, (90, 64)), (WORDS, (64, 80))):
        monkeypatch.setitem(SIZES, module, size)
    ranks = dict.fromkeys(SIZES, 3)
    folders = [adapter(f"a{n}", ranks, seed=n) for n in range(num)]
    pymerge.combine_lora(folders, tmp_path / "out", method="robust_merge")
    for module in SIZES:
        a, b = official_robust_merge([factors(each, module)[:2] for each in folders])
        found = factors(tmp_path / "out", module)
        np.testing.assert_allclose(found[0], a, rtol=1e-6)
        np.testing.assert_allclose(found[1], b, rtol=1e-6)
        assert found[2] == 2, "the adapters' scale"


def test_robust_merge_of_many_ranks():
    """Ranks where the lifted quantile is inside."""
    rng = np.random.default_rng(0)
    for rank in (1, 2, 5, 16, 40):
        pairs = [(rng.normal(size=(rank, 64)), rng.normal(size=(48, rank))) for _ in range(3)]
        given = [Low(torch.from_numpy(a), torch.from_numpy(b), 9.0) for a, b in pairs]
        found = robust_merge(given)
        a, b = official_robust_merge(pairs)
        np.testing.assert_allclose(found.a.numpy(), a, rtol=1e-12)
        np.testing.assert_allclose(found.b.numpy(), b, rtol=1e-12)


def test_robust_merge_survives_rows_that_are_trimmed_away():
    """The released code divides by zero there."""
    a = torch.randn(5, 10, dtype=torch.float64, generator=torch.manual_seed(0))
    a[2] *= 1e-9
    a[3] = 0
    b = torch.randn(8, 5, dtype=torch.float64)
    found = robust_merge([Low(a, b, 1.0), Low(torch.zeros_like(a), b, 1.0)])
    assert found.a.isfinite().all()
    assert found.b.isfinite().all()
    assert not found.a[2:4].any()
    single = robust_merge([Low(a, b, 1.0)])
    # one adapter: the strengths cancel, and B is twice the trimmed one
    kept = single.b != 0
    torch.testing.assert_close(single.b[kept], 2 * b[kept])


def test_saved_modules(adapter, tmp_path):
    head, norm = torch.randn(4, 12), torch.randn(12)
    name, other = "base_model.model.lm_head.weight", "base_model.model.model.norm.weight"
    folders = [
        adapter("one", extra={name: head}, modules_to_save=["lm_head"]),
        adapter(
            "two", seed=1, extra={name: head, other: norm}, modules_to_save=["lm_head", "norm"]
        ),
    ]
    report = pymerge.combine_lora(folders, tmp_path / "out", method="cat")
    assert set(report.saved) == {"lm_head.weight", "model.norm.weight"}
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(found[name], head)
    assert torch.equal(found[other], norm)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "norm"]
    third = adapter("three", seed=2, extra={name: head + 1}, modules_to_save=["lm_head"])
    with pytest.raises(PlanError, match="2 that differ"):
        pymerge.combine_lora([folders[0], third], tmp_path / "bad", method="cat")
    pymerge.combine_lora([folders[0], third], tmp_path / "mean", method="robust_merge")
    found = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    torch.testing.assert_close(found[name], head + 0.5)


def test_biases_of_b_are_summed(adapter, tmp_path):
    names = [f"base_model.model.{module}.lora_B.bias" for module in (Q, UP)]
    biases = [
        {n: torch.randn(SIZES[m][0]) for n, m in zip(names, (Q, UP), strict=True)} for _ in "ab"
    ]
    folders = [
        adapter(f"a{n}", {Q: 3, UP: 3}, n, extra=each, lora_bias=True)
        for n, each in enumerate(biases)
    ]
    for method in ("svd", "cat"):
        pymerge.combine_lora(folders, tmp_path / method, method=method, weights=[1, 3])
        found = load_file(tmp_path / method / "adapter_model.safetensors")
        for name in names:
            torch.testing.assert_close(found[name], 2 * biases[0][name] + 6 * biases[1][name])
        assert json.loads((tmp_path / method / "adapter_config.json").read_text())["lora_bias"]
    with pytest.raises(PlanError, match="no rule"):
        pymerge.combine_lora(folders, tmp_path / "linear", method="linear")


def test_convolutions(tmp_path):
    """Factors with kernel sizes behind."""
    folders = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        a = torch.from_numpy(rng.normal(size=(2, 3, 3, 3)).astype(np.float32))
        b = torch.from_numpy(rng.normal(size=(5, 2, 1, 1)).astype(np.float32))
        folder = tmp_path / f"a{seed}"
        folder.mkdir()
        start = f"base_model.model.{CONV}.lora_"
        save_file(
            {f"{start}A.weight": a, f"{start}B.weight": b}, folder / "adapter_model.safetensors"
        )
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        folders.append(folder)

    def dense(folder):
        found = load_file(folder / "adapter_model.safetensors")
        a, b = (found[f"base_model.model.{CONV}.lora_{x}.weight"] for x in "AB")
        assert a.shape[1:] == (3, 3, 3)
        assert b.shape[2:] == (1, 1)
        return torch.einsum("or,rikl->oikl", b.double()[:, :, 0, 0], a.double())

    for method, options in (("cat", {}), ("svd", {"energy": 1.0})):
        pymerge.combine_lora(folders, tmp_path / method, method=method, **options)
        torch.testing.assert_close(dense(tmp_path / method), dense(folders[0]) + dense(folders[1]))


def test_dtypes(adapter, tmp_path):
    half = adapter("half", dtype=torch.bfloat16)
    full = adapter("full", seed=1)
    for number, (folders, dtype, expected) in enumerate(
        [
            ([half, half], None, torch.bfloat16),
            ([half, full], None, torch.float32),
            ([half, full], "float16", torch.float16),
        ]
    ):
        out = tmp_path / f"out{number}"
        pymerge.combine_lora(folders, out, method="cat", dtype=dtype)
        found = load_file(out / "adapter_model.safetensors")
        assert {value.dtype for value in found.values()} == {expected}


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_a_byte(adapter, tmp_path, method):
    folders = [adapter("one"), adapter("two", seed=1)]
    options = {"density": 0.5} if METHODS[method].prunes else {}
    files = []
    for threads in (1, 2):
        out = tmp_path / f"out{threads}"
        pymerge.combine_lora(folders, out, method=method, threads=threads, **options)
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("second", "method", "error", "words"),
    [
        ({"base_model_name_or_path": "other/model"}, "svd", PlanError, "base_model_name_or_path"),
        ({"fan_in_fan_out": True}, "svd", PlanError, "fan_in_fan_out"),
        ({"use_dora": True}, "svd", CheckpointError, "use_dora"),
        ({"peft_type": "LOHA"}, "svd", CheckpointError, "peft_type"),
        ({"target_modules": ["q_proj"]}, "svd", CheckpointError, "target_modules"),
        ({"r": 4}, "svd", CheckpointError, "by the rank"),
        ({"ranks": {Q: 4}, "r": 4}, "linear", PlanError, "one rank"),
        ({"lora_alpha": 7}, "robust_merge", PlanError, "one scale"),
    ],
)
def test_adapters_that_do_not_fit(adapter, tmp_path, second, method, error, words):
    folders = [adapter("one"), adapter("two", **second)]
    with pytest.raises(error, match=words):
        pymerge.combine_lora(folders, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_factors_of_other_shapes(adapter, tmp_path, monkeypatch):
    one = adapter("one")
    monkeypatch.setitem(SIZES, UP, (22, 12))
    with pytest.raises(PlanError, match=r"model\.up_proj"):
        pymerge.combine_lora([one, adapter("two")], tmp_path / "out")


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_factors_that_the_format_cannot_hold(adapter, tmp_path, method):
    with pytest.raises(CheckpointError, match=r"model\.\w+: expected values that F16 can hold"):
        pymerge.combine_lora(
            [adapter("a")], tmp_path / "out", method=method, weights=[1e12], dtype="float16"
        )
    assert not (tmp_path / "out").exists()
    report = pymerge.combine_lora(
        [adapter("b")], tmp_path / "out", method=method, weights=[1e12], dtype="bfloat16"
    )
    assert len(report.modules) == 3


def test_factors_that_are_not_finite(adapter, tmp_path):
    one = adapter("one")
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="1 elements"):
        pymerge.combine_lora([one], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"one"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "svdd"}, "did you mean svd"),
        ({"weights": [1.0]}, "2 numbers"),
        ({"weights": [1.0, float("nan")]}, "2 numbers"),
        ({"method": "robust_merge", "weights": [1.0, 1.0]}, "weighs by itself"),
        ({"method": "cat", "rank": 3}, "does not truncate"),
        ({"method": "ties"}, "density"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"density": 0.5}, "density"),
        ({"rank": 0}, "rank"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_wrong_arguments(adapter, tmp_path, options, words):
    folders = [adapter("one"), adapter("two", seed=1)]
    with pytest.raises(PymergeError, match=words):
        pymerge.combine_lora(folders, tmp_path / "out", **options)


def test_no_adapters(tmp_path):
    with pytest.raises(PymergeError, match="at least one"):
        pymerge.combine_lora([], tmp_path / "out")


def test_an_adapter_is_no_output(adapter, tmp_path):
    one, two = adapter("one"), adapter("two", seed=1)
    with pytest.raises(PlanError, match="one of the adapters"):
        pymerge.combine_lora([one, two], one, overwrite=True)


def test_the_command(adapter, tmp_path, run_pymerge):
    adapter("one"), adapter("two", seed=1)
    weights = ["--weight", "0.5", "--weight", "-0.5"]
    done = run_pymerge("combine-lora", "out", "one", "two", *weights, "--rank", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out: svd, 3 modules of rank 2," in done.stdout
    u, s, vt = np.linalg.svd((delta(tmp_path / "one", UP) - delta(tmp_path / "two", UP)) / 2)
    best = u[:, :2] * s[:2] @ vt[:2]
    assert relative(delta(tmp_path / "out", UP), best) < 1e-6
    wrong = run_pymerge("combine-lora", "bad", "one", "--method", "ties", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "density" in wrong.stderr
