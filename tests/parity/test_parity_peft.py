"""base+adapter against PEFT's own merge of the adapters that it writes.

PEFT sums the products of B A in another order and rounds s B A before it is added, so a weight may
differ by a few roundings of float32 at the size of its terms; in bfloat16 that meets the same
rounding but for rare ties. With DoRA, PEFT's norms and quotients are float32, ours float64 rounded
once.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge

DRIVER = Path(__file__).with_name("drive_peft.py")
R4 = {"r": 4, "lora_alpha": 12}
CASES: dict[str, dict[str, Any]] = {
    name: {"base": base, "config": {**R4, **config}}
    for name, base, config in (
        ("plain", "float32", {"target_modules": ["q_proj", "down_proj"]}),
        ("rounded", "bfloat16", {"target_modules": ["q_proj", "down_proj"]}),
        ("rslora", "float32", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        (
            "patterns",
            "float32",
            {
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "rank_pattern": {"up_proj": 2, "layers.1.self_attn.q_proj": 3},
                "alpha_pattern": {"v_proj": 5, r"layers\.\d+\.mlp\.up_proj": 7},
            },
        ),
        ("regex", "float32", {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
        ("all", "float32", {"target_modules": "all-linear"}),
        ("dora", "float32", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("embedding", "float32", {"target_modules": ["embed_tokens", "q_proj"]}),
        (
            "embedding-dora",
            "float32",
            {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        ),
        (
            "saved",
            "float32",
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
            },
        ),
        ("bias-all", "float32", {"target_modules": ["q_proj"], "bias": "all"}),
        ("bias-lora-only", "float32", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("lora-bias", "float32", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("conv1d", "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
        ("conv1d-square", "gpt2", {"target_modules": ["attn.c_proj"]}),
        ("conv1d-dora", "gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
        ("tied-embedding", "tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        (
            "tied-saved",
            "tied",
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        ),
    )
}


@pytest.fixture(scope="module")
def folder(peers_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, adapters and PEFT's merges of all cases."""
    probe = subprocess.run([peers_python, "-c", "import peft, transformers"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"peft is not installed in the environment of {peers_python}: install it there")
    made = tmp_path_factory.mktemp("peft")
    (made / "cases.json").write_text(json.dumps(CASES))
    command = [peers_python, DRIVER, made, made / "cases.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_merges_as_peft_does(folder: Path, tmp_path: Path, name: str) -> None:
    model = f"{folder / CASES[name]['base']}+{folder / name}"
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    report = pymerge.merge(recipe, tmp_path / "out")
    assert not report.warnings
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(folder / f"{name}-merged" / "model.safetensors")
    base = load_file(folder / CASES[name]["base"] / "model.safetensors")
    missing = expected.keys() - found.keys()
    assert missing <= {"lm_head.weight"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(missing) == config["tie_word_embeddings"]
    changed = 0
    for key, value in found.items():
        assert value.dtype == expected[key].dtype
        # weights are below 1/2: one unit in the last place of float32 there is 2**-25
        few = 2.0**-23 if value.dtype == torch.float32 else 2.0**-9
        torch.testing.assert_close(value, expected[key], rtol=0, atol=few)
        same = (value == expected[key]).double().mean()
        assert value.dtype == torch.float32 or same > 0.99
        changed += key in base and not torch.equal(value, base[key])
    assert changed >= 2
