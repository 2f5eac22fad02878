"""Packed experts in memory: merged one by one, with the bytes of a merge of the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.in_memory import driver, tiles

EXPERTS, INNER, WIDTH = 4, 24, 40
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
WEIGHTS = [0.4, 0.7]
CASES = {
    "ties": {"density": 0.3},
    "ties of the model": {"density": 0.3, "trim_scope": "model"},
    "iso_c": {},
    "slerp": {"t": 0.3},
    "task_arithmetic": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tunes of it, each expert of another magnitude; and their folders."""
    root, found, folders = tmp_path_factory.mktemp("experts"), [], []
    for seed in range(3):
        torch.manual_seed(seed)
        size = 10.0 ** torch.arange(EXPERTS).reshape(-1, 1, 1) * (1 if seed == 0 else 0.1)
        change = {
            GATE_UP: torch.randn(EXPERTS, 2 * INNER, WIDTH) * size,
            DOWN: torch.randn(EXPERTS, WIDTH, INNER) * size,
            "self_attn.q_proj.weight": torch.randn(WIDTH, WIDTH),
            "norm.weight": torch.randn(WIDTH),
        }
        found.append({k: each + (found[0][k] if found else 0) for k, each in change.items()})
        folders.append(root / str(seed))
        folders[-1].mkdir()
        save_file(found[-1], folders[-1] / "model.safetensors", {"format": "pt"})
        (folders[-1] / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return found, folders


def through_files(case, folders, out):
    method, own = case.split()[0], {} if case == "slerp" else {"weight": WEIGHTS}
    rows = [{k: v[i] for k, v in own.items()} for i in range(2)]
    given = folders[1:2] if method == "slerp" else folders[1:]
    listed = [{"model": str(f), "parameters": r} for f, r in zip(given, rows, strict=False)]
    recipe = {"merge_method": method, "base_model": str(folders[0]), "models": listed}
    if method == "slerp":
        recipe["models"].insert(0, {"model": str(folders[0])})
    pymerge.merge({**recipe, "parameters": CASES[case]}, out)
    return load_file(out / "model.safetensors")


def arguments(case, found):
    own = {} if case == "slerp" else {"weight": WEIGHTS}
    given = found[1:2] if case == "slerp" else found[1:]
    return (found[0], given), {"method": case.split()[0], **own, **CASES[case]}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_a_merge_through_files(case, models, tmp_path, monkeypatch):
    found, folders = models
    expected = through_files(case, folders, tmp_path / "out")
    inputs, given = arguments(case, found)
    assert_same(pymerge.merge_state_dicts(*inputs, **given), expected)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 256)
    monkeypatch.setattr(driver, "GROUP_BYTES", 20_000)
    for threads in (1, 3):
        assert_same(pymerge.merge_state_dicts(*inputs, threads=threads, **given), expected)
    base = {name: tensor.clone() for name, tensor in found[0].items()}
    pymerge.merge_state_dicts(base, inputs[1], out=base, **given)
    assert_same(base, expected)
    with pymerge.Session(*inputs, **given) as session:
        for _ in range(2):
            assert_same(session.merge(), expected)


def test_a_session_takes_them_apart_where_the_parameters_ask_for_it(models):
    found, _ = models
    with pymerge.Session(found[0], found[1:], method="ties", weight=WEIGHTS) as session:
        for density in (1.0, 0.3, 1.0, 0.6, 0.3):
            expected = pymerge.merge_state_dicts(
                found[0], found[1:], method="ties", weight=WEIGHTS, density=density
            )
            assert_same(session.merge(density=density), expected)


def test_with_numerics_of_mergekit_they_stay_whole(models):
    found, _ = models
    given = {"method": "ties", "weight": WEIGHTS, "density": 0.3, "numerics": "mergekit"}
    merged = pymerge.merge_state_dicts(found[0], found[1:], **given)
    renamed = [{k.replace("experts", "dense"): v for k, v in each.items()} for each in found]
    expected = pymerge.merge_state_dicts(renamed[0], renamed[1:], **given)
    assert torch.equal(merged[DOWN], expected[DOWN.replace("experts", "dense")])


def test_sentences_name_the_expert(models):
    found, _ = models
    broken = {name: tensor.clone() for name, tensor in found[1].items()}
    broken[DOWN][2, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"non-finite elements: mlp\.experts\.down_proj\[2\] \(1"):
        pymerge.merge_state_dicts(found[0], [broken], method="ties", weight=1.0, density=0.5)
