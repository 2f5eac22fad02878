"""Which tensors are taken as float8 codes with scales, and which quantised models are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pymerge.checkpoint import ScaledTensor, nominal_format, open_checkpoint
from pymerge.errors import CheckpointError

Shapes = Mapping[str, tuple[str, list[int]]]
BITS = {"F8_E4M3": 8, "F8_E8M0": 8, "F32": 32, "BF16": 16, "U8": 8, "I8": 8, "I32": 32, "F16": 16}


def write(folder: Path, tensors: Shapes, config: Mapping[str, Any] | None = None) -> str:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("scales", "shape", "block"),
    [
        ("l.weight_scale_inv", [3, 2], (128, 128)),
        ("l.weight_scale", [3, 2], (128, 128)),
        ("l.weight_scale", [300, 1], (1, 200)),
        ("l.weight_scale", [300], (1, 200)),
        ("l.weight_scale", [], (300, 200)),
        ("l.weight_scale_inv", [1], (300, 200)),
        ("l.weight_scale", [1, 200], (300, 1)),
        ("l.weight_scale_inv", [100, 50], (3, 4)),
        ("l.scale", [3, 2], (128, 128)),
        ("l.qscale_weight", [], (300, 200)),
    ],
)
def test_codes_and_scales_are_one_weight(tmp_path, scales, shape, block):
    tensors = {"l.weight": ("F8_E4M3", [300, 200]), scales: ("F32", shape)}
    found = open_checkpoint(write(tmp_path, tensors)).tensors
    assert list(found) == ["l.weight"]
    weight = found["l.weight"]
    assert isinstance(weight, ScaledTensor)
    assert (weight.block_rows, weight.block_columns) == block
    assert weight.shape == (300, 200)
    assert weight.num_elements == 300 * 200
    assert weight.format.name == "F32"
    assert nominal_format(weight).name == "BF16"


def test_blocks_are_those_of_the_configuration(tmp_path):
    tensors = {"l.weight": ("F8_E4M3", [100, 100]), "l.weight_scale_inv": ("BF16", [2, 4])}
    settings = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    config = {"quantization_config": settings, "torch_dtype": "float16"}
    weight = open_checkpoint(write(tmp_path, tensors, config)).tensors["l.weight"]
    assert (weight.block_rows, weight.block_columns) == (64, 32)
    assert nominal_format(weight).name == "F16"


def test_packed_experts_have_scales_of_their_own(tmp_path):
    tensors = {
        "experts.gate_up_proj": ("F8_E4M3", [2, 256, 130]),
        "experts.gate_up_proj_scale_inv": ("F8_E8M0", [2, 2, 2]),
        "experts.down_proj": ("F8_E4M3", [2, 130, 128]),
        "experts.down_proj_scale": ("F32", [2]),
        "experts.down_proj_activation_scale": ("F32", [2]),
    }
    found = open_checkpoint(write(tmp_path, tensors))
    assert list(found.tensors) == ["experts.gate_up_proj", "experts.down_proj"]
    assert found.tensors["experts.gate_up_proj"].grid == (2, 2)
    assert found.tensors["experts.down_proj"].grid == (1, 1)


def test_other_scales_are_left_out_with_a_warning(tmp_path):
    tensors = {
        "l.q_proj.weight": ("F8_E4M3", [4, 4]),
        "l.q_proj.weight_scale": ("F32", [1]),
        "l.q_proj.input_scale": ("F32", [1]),
        "l.k_scale": ("F32", [1]),
        "l.o_proj.weight": ("F8_E4M3", [4, 4]),
        "l.norm.weight": ("BF16", [4]),
    }
    found = open_checkpoint(write(tmp_path, tensors))
    assert list(found.tensors) == ["l.q_proj.weight", "l.o_proj.weight", "l.norm.weight"]
    assert "2 scales of activations" in found.warnings[0]
    assert "1 of its float8 tensors have no scales" in found.warnings[1]
    assert not isinstance(found.tensors["l.o_proj.weight"], ScaledTensor)


def test_names_of_scales_mean_nothing_without_codes(tmp_path):
    tensors = {"l.weight": ("BF16", [4, 4]), "l.input_scale": ("F32", [1])}
    assert len(open_checkpoint(write(tmp_path, tensors)).tensors) == 2


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (("F32", [3, 3]), "one scale, one for each row"),
        (("F32", [7]), "one scale, one for each row"),
        (("I32", [3, 2]), "floats or exponents of two"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, scales, words):
    tensors = {"l.weight": ("F8_E4M3", [300, 200]), "l.weight_scale_inv": scales}
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(write(tmp_path, tensors))


FLOAT8 = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
INT8 = {"weights": {"type": "int", "num_bits": 8}}


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": FLOAT8},
        },
    ],
)
def test_float8_configurations_are_accepted(tmp_path, settings):
    tensors = {"l.weight": ("F8_E4M3", [4, 4]), "l.weight_scale": ("F32", [4, 1])}
    config = {"quantization_config": settings}
    assert len(open_checkpoint(write(tmp_path, tensors, config)).tensors) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "mxfp4"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": INT8},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"group_0": FLOAT8, "group_1": INT8},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": FLOAT8},
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_other_configurations_are_refused(tmp_path, settings):
    config = {"quantization_config": settings}
    with pytest.raises(CheckpointError, match=r"quantis.*unquantised model"):
        open_checkpoint(write(tmp_path, {"l.weight": ("BF16", [4])}, config))


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"l.qweight": ("I32", [4]), "l.qzeros": ("I32", [1])}, "GPTQ or AWQ"),
        ({"l.weight": ("U8", [4]), "l.weight.absmax": ("F32", [1])}, "bitsandbytes"),
        ({"e.gate_up_proj_blocks": ("U8", [4]), "e.gate_up_proj_scales": ("U8", [1])}, "MXFP4"),
        ({"l.weight": ("I8", [4, 4]), "l.weight_scale": ("F32", [4, 1])}, "no float8"),
        ({"l.weight": ("I8", [4, 4]), "l.scale": ("F8_E8M0", [4, 1])}, "no float8"),
        (
            {
                "l.weight": ("U8", [4, 8]),
                "l.weight_scale": ("F8_E4M3", [4, 1]),
                "l.weight_scale_2": ("F32", []),
            },
            "NVFP4",
        ),
        (
            {"l.weight_packed": ("U8", [4]), "l.weight_global_scale": ("F32", [1])},
            "NVFP4 by compressed-tensors",
        ),
        ({"l.weight": ("F8_E4M3", [4]), "l.weight_zero_point": ("I8", [1])}, "zero points"),
    ],
)
def test_other_codes_are_refused_by_their_names(tmp_path, tensors, kind):
    with pytest.raises(CheckpointError, match=rf"\(.*{kind}.*\).*unquantised model"):
        open_checkpoint(write(tmp_path, tensors))


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    for reference in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF.*safetensors original"):
            open_checkpoint(str(reference))


def test_inspect_says_how_a_weight_is_stored(tmp_path, run_pymerge):
    tensors = {"l.weight": ("F8_E4M3", [300, 200]), "l.weight_scale_inv": ("F32", [3, 2])}
    folder = write(tmp_path / "m", tensors)
    done = run_pymerge("inspect", folder, cwd=tmp_path)
    assert "F8_E4M3 with 6 scales (128x128 elements each)" in done.stdout.replace("\n", " ")
    found = json.loads(run_pymerge("inspect", folder, "--json", cwd=tmp_path).stdout)
    assert found["l.weight"]["counts_as"] == "BF16"
    assert found["l.weight"]["bytes"] == 300 * 200 + 6 * 4
