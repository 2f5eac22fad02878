"""Extraction: what is written, put on the base, against the model in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.checkpoint import open_checkpoint, read_header, update_of
from pymerge.errors import BackendError, CheckpointError, PlanError, PymergeError, StorageError

from .conftest import HIDDEN, INNER, WORDS, llama_shapes, low_rank, random

Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj" for n in range(2))
UP0, DOWN1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
LINEAR = [f"model.layers.{n}.{m}" for n in range(2) for m in ("mlp.down_proj", "mlp.up_proj")]
LINEAR += [Q0, Q1]


@pytest.fixture
def base():
    return random(llama_shapes(), 0)


def tuned(base, modules, rank=3):
    """The base with a change of this rank in each of the modules."""
    found = dict(base)
    for seed, module in enumerate(modules):
        name = f"{module}.weight"
        found[name] = base[name] + low_rank(tuple(base[name].shape), rank, seed)
    return found


def put_on(base, adapter, tmp_path):
    """The base with the adapter on it, by the merge engine."""
    model = f"{base}+{adapter}"
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    pymerge.merge(recipe, tmp_path / "merged")
    return load_file(tmp_path / "merged" / "model.safetensors")


def optimal(delta, rank):
    """The least Frobenius error of a matrix of this rank, in float64."""
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


@pytest.mark.parametrize("distribute", [True, False])
def test_low_rank_changes_come_back(base, write, tmp_path, distribute):
    model = tuned(base, LINEAR)
    model["model.norm.weight"] = base["model.norm.weight"] + 1
    model["lm_head.weight"] = base["lm_head.weight"] * 2
    folders = write("base", base), write("model", model)
    report = pymerge.extract_lora(
        *folders, tmp_path / "out", epsilon=1e-5, distribute_scale=distribute
    )
    assert {module.name: module.rank for module in report.modules} == dict.fromkeys(LINEAR, 3)
    assert report.worst.energy > 1 - 1e-10
    assert set(report.saved) == {"lm_head", "model.norm"}
    assert not report.warnings
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    for name, value in model.items():
        # float32 at weights below 1/2, and factors rounded to float32
        torch.testing.assert_close(found[name], value, rtol=0, atol=2.0**-23)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    norms = [torch.linalg.norm(factors[f"base_model.model.{Q0}.lora_{x}.weight"]) for x in "AB"]
    if distribute:
        torch.testing.assert_close(norms[0], norms[1])
    else:
        torch.testing.assert_close(norms[1] ** 2, torch.tensor(3.0))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert sorted(config["modules_to_save"]) == ["lm_head", "model.norm"]
    assert config["base_model_name_or_path"] == str(folders[0])
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("route", ["gram", "randomized"])
@pytest.mark.parametrize("rank", [1, 5, 100])
def test_error_is_the_least_possible(base, write, tmp_path, rank, route):
    """Of full-rank noise, to the bound of the route: the Gram route is exact, the other within 5 %
    with as many spare directions as its rank and six power steps."""
    model = {k: v + 0.01 * torch.randn_like(v) if v.ndim == 2 else v for k, v in base.items()}
    folders = write("base", base), write("model", model)
    options = {"rank": rank, "route": route, "exclude": ["embed", "lm_head"]}
    report = pymerge.extract_lora(*folders, tmp_path / "out", **options)
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    for module in report.modules:
        name = f"{module.name}.weight"
        delta = model[name] - base[name]
        assert module.rank == min(rank, HIDDEN)
        error = float((found[name].double() - base[name].double() - delta.double()).norm())
        least = optimal(delta, rank)
        slack = 1e-6 if route == "gram" else 5e-2
        assert error <= least * (1 + slack) + 1e-6
        share = 1 - (least / float(delta.double().norm())) ** 2
        assert abs(module.energy - share) < (1e-6 if route == "gram" else 5e-2)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_rank_is_the_smallest_that_holds_the_energy(base, write, tmp_path, energy):
    """Values 1, 1/2, 1/4, ...: of the energy 3/4 are in the first, 15/16 in the first two, ..."""
    model = tuned(base, LINEAR, rank=6)
    folders = write("base", base), write("model", model)
    report = pymerge.extract_lora(*folders, tmp_path / "out", energy=energy, epsilon=1e-5)
    squares = 0.25 ** np.arange(6)
    held = np.cumsum(squares) / squares.sum()
    expected = int(np.argmax(held >= energy - 1e-9)) + 1
    assert {module.rank for module in report.modules} == {expected}
    for module in report.modules:
        assert abs(module.energy - held[expected - 1]) < 1e-5
    limited = pymerge.extract_lora(*folders, tmp_path / "limited", energy=energy, rank=2)
    assert {module.rank for module in limited.modules} == {min(expected, 2)}


def test_ranks_that_differ_go_into_the_patterns(base, write, tmp_path):
    model = tuned(base, LINEAR)
    model[f"{Q1}.weight"] = base[f"{Q1}.weight"] + low_rank((HIDDEN, HIDDEN), 1, 9)
    folders = write("base", base), write("model", model)
    pymerge.extract_lora(*folders, tmp_path / "out", epsilon=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {Q1: 1}
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    torch.testing.assert_close(found[f"{Q1}.weight"], model[f"{Q1}.weight"], rtol=0, atol=2.0**-23)


def test_unchanged_modules_are_not_written_and_not_targets(base, write, tmp_path):
    folders = write("base", base), write("model", tuned(base, [Q0, UP0, DOWN1, LINEAR[0]]))
    report = pymerge.extract_lora(*folders, tmp_path / "out", epsilon=1e-5)
    assert {module.name for module in report.modules} == {Q0, UP0, DOWN1, LINEAR[0]}
    assert not report.saved
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(["down_proj", Q0, UP0])
    assert config["modules_to_save"] is None


def test_include_exclude_and_save(base, write, tmp_path):
    model = tuned(base, LINEAR)
    folders = write("base", base), write("model", model)
    report = pymerge.extract_lora(
        *folders,
        tmp_path / "out",
        include=[r"layers\.0", "norm"],
        exclude=["up_proj"],
        save_modules=[Q1, "norm"],
        rank=3,
    )
    assert {module.name for module in report.modules} == {Q0, LINEAR[0]}
    # PEFT takes "model.norm" for the end of a name; no other name ends so here
    assert set(report.saved) == {Q1, "model.norm"}
    assert UP0 in report.left_out
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    assert torch.equal(found[f"{UP0}.weight"], base[f"{UP0}.weight"])
    assert torch.equal(found[f"{Q1}.weight"], model[f"{Q1}.weight"])


@pytest.mark.parametrize("embed", [False, True])
def test_embeddings(base, write, tmp_path, embed):
    model = tuned(base, ["model.embed_tokens", "lm_head", Q0])
    folders = write("base", base), write("model", model)
    report = pymerge.extract_lora(*folders, tmp_path / "out", embed=embed, epsilon=1e-5)
    assert ("lm_head" in report.saved) is not embed
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    if embed:
        assert factors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (3, WORDS)
        assert factors["base_model.model.lm_head.lora_A.weight"].shape == (3, HIDDEN)
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    for name, value in model.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("embed", [False, True])
def test_a_tied_head_goes_with_its_embedding(base, write, tmp_path, embed):
    del base["lm_head.weight"]
    model = tuned(base, ["model.embed_tokens", Q0])
    folders = (write(n, t, tie_word_embeddings=True) for n, t in (("base", base), ("model", model)))
    folders = tuple(folders)
    report = pymerge.extract_lora(*folders, tmp_path / "out", embed=embed)
    assert set(report.saved) == {"model.embed_tokens", "lm_head"}
    assert len(report.warnings) == embed
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(found[f"{name}.weight"], model["model.embed_tokens.weight"])


def test_a_head_that_the_model_ties_and_the_base_does_not(base, write, tmp_path):
    model = tuned(base, [Q0])
    del model["lm_head.weight"]
    folders = write("base", base), write("model", model, tie_word_embeddings=True)
    report = pymerge.extract_lora(*folders, tmp_path / "out")
    assert report.saved == ("lm_head",)
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    assert torch.equal(found["lm_head.weight"], base["model.embed_tokens.weight"])


def test_a_larger_vocabulary_is_saved_whole_with_a_warning(base, write, tmp_path):
    model = tuned(base, [Q0])
    model["lm_head.weight"] = torch.randn(WORDS + 3, HIDDEN)
    report = pymerge.extract_lora(
        write("base", base), write("model", model), tmp_path / "out", embed=True
    )
    assert report.saved == ("lm_head",)
    assert "resize" in report.warnings[0]


def test_biases_of_some_modules_are_written_themselves(base, write, tmp_path):
    model = tuned(base, LINEAR)
    model[f"{Q0}.bias"] = base[f"{Q0}.bias"] + 1
    folders = write("base", base), write("model", model)
    pymerge.extract_lora(*folders, tmp_path / "out", epsilon=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["lora_bias"]) == ("all", False)
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    assert torch.equal(found[f"{Q0}.bias"], model[f"{Q0}.bias"])
    assert torch.equal(found[f"{Q1}.bias"], base[f"{Q1}.bias"])


def test_biases_of_all_modules_are_written_as_differences(base, write, tmp_path):
    model = tuned(base, [Q0])
    model[f"{Q1}.bias"] = base[f"{Q1}.bias"] + 1
    folders = write("base", base), write("model", model)
    report = pymerge.extract_lora(*folders, tmp_path / "out", epsilon=1e-5)
    assert {module.name: module.rank for module in report.modules} == {Q0: 3, Q1: 1}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["lora_bias"]) == ("none", True)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not factors[f"base_model.model.{Q0}.lora_B.bias"].any()
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    torch.testing.assert_close(found[f"{Q1}.bias"], model[f"{Q1}.bias"], rtol=0, atol=2.0**-23)
    assert torch.equal(found[f"{Q1}.weight"], base[f"{Q1}.weight"])


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_conv1d_layers_are_transposed(write, tmp_path, prefix):
    shapes = {f"{prefix}h.0.attn.c_attn.weight": (8, 24), f"{prefix}h.0.attn.c_proj.weight": (8, 8)}
    base = random({**shapes, f"{prefix}wte.weight": (20, 8), f"{prefix}ln_f.weight": (8,)}, 0)
    model = {k: v + low_rank(tuple(v.shape), 2, 1) if k in shapes else v for k, v in base.items()}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folders = write("base", base, **config), write("model", model, **config)
    pymerge.extract_lora(*folders, tmp_path / "out", rank=2)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    start = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    assert factors[f"{start}A.weight"].shape == (2, 8)
    assert factors[f"{start}B.weight"].shape == (24, 2)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    found = put_on(folders[0], tmp_path / "out", tmp_path)
    for name, value in model.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2.0**-23)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 2.0**-22), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)]
)
def test_half_precision_models_and_factors(base, write, tmp_path, dtype, bound):
    """The change of bfloat16 models is exact in float32; the factors are rounded once, so the
    product is off by at most about two roundings of its norm."""
    kind = torch.bfloat16
    model = {k: v.to(kind) for k, v in tuned(base, LINEAR).items()}
    base = {k: v.to(kind) for k, v in base.items()}
    pymerge.extract_lora(
        write("base", base), write("model", model), tmp_path / "out", rank=HIDDEN, dtype=dtype
    )
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in LINEAR:
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == b.dtype == getattr(torch, dtype)
        delta = model[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        assert (b.double() @ a.double() - delta).norm() <= bound * delta.norm()


def test_factors_that_the_format_cannot_hold(base, write, tmp_path):
    model = {**base, f"{Q0}.weight": base[f"{Q0}.weight"] * 1e15}
    folders = write("base", base), write("model", model)
    with pytest.raises(CheckpointError, match=rf"{Q0}: expected values that F16 can hold"):
        pymerge.extract_lora(*folders, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_threads_do_not_change_a_byte(base, write, tmp_path):
    folders = write("base", base), write("model", tuned(base, LINEAR))
    files = []
    for threads in (1, 2, 3):
        out = tmp_path / f"out{threads}"
        pymerge.extract_lora(*folders, out, threads=threads)
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_names_that_saved_ones_are_the_end_of(base, write, tmp_path):
    """PEFT takes "norm" for the end of "input_layernorm": those are saved as well."""
    bare = {name.removeprefix("model."): value for name, value in base.items()}
    model = {**bare, "norm.weight": bare["norm.weight"] + 1}
    name = "layers.0.mlp.up_proj.weight"
    model[name] = bare[name] + low_rank((INNER, HIDDEN), 2, 0)
    report = pymerge.extract_lora(write("base", bare), write("model", model), tmp_path / "out")
    layers = {f"layers.{n}.input_layernorm" for n in range(2)}
    assert set(report.saved) == {"norm", *layers}


def test_nothing_is_left_of_a_failed_run(base, write, tmp_path):
    model = tuned(base, LINEAR)
    model[f"{DOWN1}.weight"] = model[f"{DOWN1}.weight"].clone()
    model[f"{DOWN1}.weight"][0, 0] = float("nan")
    folders = write("base", base), write("model", model)
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="1 elements"):
        pymerge.extract_lora(*folders, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_a_partial_folder_does_not_look_whole(base, write, tmp_path):
    """Seen while it is written: another name, no configuration, a header that no reader takes."""
    folders = write("base", base), write("model", tuned(base, LINEAR))
    seen = []

    def look(done: int, num: int) -> None:
        assert not (tmp_path / "out").exists()
        (partial,) = tmp_path.glob(".out.*.partial")
        assert [path.name for path in partial.iterdir()] == ["adapter_model.safetensors"]
        with pytest.raises(CheckpointError, match="unfinished"):
            read_header(partial / "adapter_model.safetensors")
        seen.append(done)

    pymerge.extract_lora(*folders, tmp_path / "out", threads=1, progress=look)
    assert seen == [4, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}
    assert len(read_header(tmp_path / "out" / "adapter_model.safetensors").tensors) == 12


def test_overwriting(base, write, tmp_path):
    folders = write("base", base), write("model", tuned(base, LINEAR))
    out = tmp_path / "out"
    pymerge.extract_lora(*folders, out, rank=1)
    with pytest.raises(PlanError, match="found an adapter"):
        pymerge.extract_lora(*folders, out, rank=2)
    pymerge.extract_lora(*folders, out, rank=2, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"notes\.txt"):
        pymerge.extract_lora(*folders, out, overwrite=True)
    with pytest.raises(PlanError, match="expected a new or empty folder"):
        pymerge.extract_lora(*folders, folders[0], overwrite=True)


def test_a_source_that_changes_is_noticed(base, write, tmp_path):
    folders = write("base", base), write("model", tuned(base, LINEAR))
    file = folders[1] / "model.safetensors"

    def touch(done: int, num: int) -> None:
        file.touch()

    with pytest.raises(StorageError, match="changed while"):
        pymerge.extract_lora(*folders, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def change(model, name, value):
    return {**model, name: value}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda b, m: (b, b), "nothing to extract"),
        (lambda b, m: (b, {**b, "model.norm.weight": b["model.norm.weight"] + 1}), "whole"),
        (lambda b, m: (b, change(m, f"{Q0}.weight", torch.ones(3, 3))), "expected one of the base"),
        (lambda b, m: (b, {k: v for k, v in m.items() if "norm" not in k}), "expected all tensors"),
        (
            lambda b, m: (
                change(b, "model.experts.up", b[f"{UP0}.weight"][None]),
                change(m, "model.experts.up", m[f"{UP0}.weight"][None]),
            ),
            "a stack of matrices",
        ),
        (
            lambda b, m: (
                change(b, "model.cls_token", torch.zeros(4)),
                change(m, "model.cls_token", torch.ones(4)),
            ),
            "no module's weight or bias",
        ),
        (lambda b, m: (b, change(m, f"{UP0}.bias", torch.ones(INNER))), "no such tensor"),
    ],
    ids=["equal", "no linear", "shape", "lost", "experts", "parameter", "new bias"],
)
def test_models_that_do_not_fit(base, write, tmp_path, edit, words):
    old, new = edit(base, tuned(base, LINEAR))
    old, new = ({name: value.clone() for name, value in each.items()} for each in (old, new))
    folders = write("base", old), write("model", new)
    with pytest.raises(PlanError, match=words):
        pymerge.extract_lora(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 0}, PymergeError, "rank"),
        ({"energy": 1.5}, PymergeError, "energy"),
        ({"energy": 0}, PymergeError, "energy"),
        ({"epsilon": -1}, PymergeError, "epsilon"),
        ({"dtype": "int8"}, PymergeError, "dtype"),
        ({"route": "lapack"}, PymergeError, "route"),
        ({"include": ["("]}, PymergeError, "regular expression"),
        ({"exclude": "mlp"}, PymergeError, "list of texts"),
        ({"save_modules": ["q_porj"]}, PlanError, "nearest"),
        ({"device": "nowhere"}, BackendError, "device"),
        ({"threads": 0}, PymergeError, "threads"),
    ],
)
def test_wrong_arguments(base, write, tmp_path, options, error, words):
    folders = write("base", base), write("model", tuned(base, LINEAR))
    with pytest.raises(error, match=words):
        pymerge.extract_lora(*folders, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_with_an_adapter_is_refused(base, write, tmp_path):
    folders = write("base", base), write("model", tuned(base, LINEAR))
    pymerge.extract_lora(*folders, tmp_path / "out")
    with pytest.raises(PlanError, match="merge it into its base first"):
        pymerge.extract_lora(folders[0], f"{folders[0]}+{tmp_path / 'out'}", tmp_path / "again")


def test_the_command(base, write, tmp_path, run_pymerge):
    write("base", base), write("model", tuned(base, LINEAR))
    options = ["--energy", "0.9", "--exclude", "q_proj", "--dtype", "bfloat16"]
    done = run_pymerge("extract-lora", "base", "model", "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 modules of rank 2," in done.stdout
    assert "left out: model.layers.0.self_attn.q_proj" in done.stdout
    opened = open_checkpoint(str(tmp_path / "base"), adapter=str(tmp_path / "out"))
    assert sum(update_of(entry) is not None for entry in opened.tensors.values()) == 4
    again = run_pymerge("extract-lora", "base", "model", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
