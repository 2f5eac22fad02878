"""Float8 codes with scales are merged as the weights that they mean."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge import _C, api
from pymerge.checkpoint import open_checkpoint
from pymerge.engine.scaled import make_scaled
from pymerge.errors import CheckpointError
from pymerge.formats import BY_CODE
from pymerge.ops.reference.elements import value
from pymerge.plan import Tiling

BLOCK = 128
#: Rows and columns that are no multiples of a block, and more elements than one small tile.
SHAPES = {"a.weight": (300, 200), "b.weight": (131, 513), "norm.weight": (200,)}


def quantised(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and the float32 weight that they mean, written out element by element."""
    rows, columns = weight.shape
    if scheme == "tensor":
        scales = (weight.abs().max() / 448).reshape(1)
        each = scales.expand(rows, columns)
    elif scheme == "row":
        scales = weight.abs().amax(1, keepdim=True) / 448
        each = scales.expand(rows, columns)
    else:
        size = (-(-rows // BLOCK), -(-columns // BLOCK))
        scales = torch.empty(size)
        each = torch.empty(rows, columns)
        for i in range(size[0]):
            for j in range(size[1]):
                part = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                scales[i, j] = weight[part].abs().max() / 448
                each[part] = scales[i, j]
    codes = (weight / each).to(torch.float8_e4m3fn)
    return codes, scales, codes.to(torch.float32) * each


SCHEMES = {
    "block": ("_scale_inv", {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "row": ("_scale", {"quant_method": "fbgemm_fp8"}),
    "tensor": (
        "_scale",
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}},
        },
    ),
}


def save_scaled(folder: Path, seed: int, scheme: str) -> dict[str, torch.Tensor]:
    """Write a model; returns the float32 weights that it means."""
    torch.manual_seed(seed)
    ending, settings = SCHEMES[scheme]
    tensors, means = {}, {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape) * torch.rand(shape).pow(3)
        if len(shape) == 1:
            tensors[name] = means[name] = weight.bfloat16()
            continue
        tensors[name], tensors[name + ending], means[name] = quantised(weight, scheme)
        tensors[name.replace("weight", "input_scale")] = torch.ones(())
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return {name: value.float() for name, value in means.items()}


def save_plain(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    return {name: value.float() for name, value in tensors.items()}


def merge(folder: Path, recipe: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    recipe = {**recipe, "dtype": recipe.get("dtype", "float32")}
    api.merge(recipe, folder / "out", **options)
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("memory", ["160MiB", None])
def test_passthrough_writes_the_weights_that_codes_mean(tmp_path, scheme, memory):
    expected = save_scaled(tmp_path / "a", 1, scheme)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}
    found = merge(tmp_path, recipe, **({} if memory is None else {"memory": memory}))
    assert found.keys() == SHAPES.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float8_and_bfloat16_models_merge_together(tmp_path, scheme):
    one, two = save_scaled(tmp_path / "a", 1, scheme), save_plain(tmp_path / "b", 2)
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": weight}}
        for name, weight in (("a", 0.25), ("b", 0.75))
    ]
    found = merge(tmp_path, {"merge_method": "linear", "models": models})
    for name in SHAPES:
        expected = one[name].double() * 0.25 + two[name].double() * 0.75
        assert torch.allclose(found[name].double(), expected, rtol=0, atol=2e-7), name


def test_without_dtype_the_output_is_what_the_configuration_names(tmp_path):
    expected = save_scaled(tmp_path / "a", 1, "block")
    api.merge(
        {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}, tmp_path / "o"
    )
    found = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in SHAPES)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "iso_c"])
def test_a_merge_equals_that_of_the_dequantised_models(tmp_path, method):
    """The float32 models are written by torch; the merge of plain tensors is tested elsewhere."""
    models, plain = [], []
    for seed in range(3):
        means = save_scaled(tmp_path / f"q{seed}", seed, "block")
        folder = tmp_path / f"p{seed}"
        folder.mkdir()
        save_file(means, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama"}')
        models.append(str(tmp_path / f"q{seed}"))
        plain.append(str(folder))
    outputs = []
    for names in (models, plain):
        density = {"density": 0.4} if method == "ties" else {}
        tuned = [{"model": name, "parameters": {"weight": 0.6, **density}} for name in names[1:]]
        recipe = {"merge_method": method, "base_model": names[0], "models": tuned}
        out = tmp_path / f"out{len(outputs)}"
        api.merge({**recipe, "dtype": "float32"}, out)
        outputs.append(load_file(out / "model.safetensors"))
    for name in SHAPES:
        assert torch.equal(outputs[0][name], outputs[1][name]), name


class Blocks:
    """What a maker needs of a loader, with blocks of a few pages."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.data = path.read_bytes()
        self.events = self
        self.pool = SimpleNamespace(block_bytes=block_bytes)
        self.context = self
        self.largest = 0

    def stage(self, *args: Any) -> Any:
        return nullcontext()

    computing = stage

    def read(self, entry: Any, first: int, num_bytes: int, block: int, size: int) -> int:
        assert num_bytes + Tiling.SLACK <= size
        self.largest = max(self.largest, num_bytes)
        memory = (np.ctypeslib.ctypes.c_char * num_bytes).from_address(block)
        memory.raw = self.data[entry.offset + first : entry.offset + first + num_bytes]
        return block


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_run_of_elements_is_the_same(tmp_path, scheme):
    """Runs that begin and end within rows, blocks and blocks of rows."""
    expected = save_scaled(tmp_path / "a", 5, scheme)
    checkpoint = open_checkpoint(str(tmp_path / "a"))
    size = 64 << 10
    loader = Blocks(tmp_path / "a" / "model.safetensors", size)
    arena = _C.Arena(2 * size)
    random = np.random.default_rng(0)
    for name in ("a.weight", "b.weight"):
        whole, entry = expected[name].reshape(-1).numpy(), checkpoint.tensors[name]
        for _ in range(60):
            num = int(random.integers(1, (size - Tiling.SLACK) // 4))
            start = int(random.integers(0, len(whole) - num + 1))
            made = make_scaled(loader, entry, start, num, arena.address, [arena.address + size])
            assert BY_CODE[made.code].name == "F32"
            assert np.array_equal(value(made), whole[start : start + num])


def test_more_scales_than_fit_into_a_block_are_read_in_pieces(tmp_path):
    """A scale of eight bytes for every two elements."""
    shape = (40, 600)
    torch.manual_seed(0)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(40, 300, dtype=torch.float64)
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(
        {"a.weight": codes, "a.weight_scale": scales},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    each = scales.float().repeat_interleave(2, 1)
    entry = open_checkpoint(str(folder)).tensors["a.weight"]
    size = 48 << 10
    loader, arena = Blocks(folder / "model.safetensors", size), _C.Arena(2 * size)
    num = (size - Tiling.SLACK) // 4
    assert num // 2 * 8 > size // 2
    made = make_scaled(loader, entry, 1001, num, arena.address, [arena.address + size])
    expected = (codes.float() * each).reshape(-1).numpy()[1001 : 1001 + num]
    assert np.array_equal(value(made), expected)


def test_exponents_of_two_are_scales(tmp_path):
    torch.manual_seed(0)
    codes = torch.randn(256, 128).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120], [131]], dtype=torch.uint8)
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {"a.weight": codes, "a.weight_scale_inv": exponents}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    found = merge(tmp_path, recipe)["a.weight"]
    assert torch.equal(found[:128], codes[:128].float() * 2.0**-7)
    assert torch.equal(found[128:], codes[128:].float() * 2.0**4)


def test_an_adapter_on_float8_is_refused(tmp_path):
    save_scaled(tmp_path / "a", 1, "block")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.a"
    low = {
        f"{prefix}.lora_A.weight": torch.ones(2, 200),
        f"{prefix}.lora_B.weight": torch.ones(300, 2),
    }
    save_file(low, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"stored as plain weights, found it made of F8_E4M3"):
        open_checkpoint(f"{tmp_path / 'a'}+{adapter}")
