"""Recognising quantised checkpoints, whose codes must not be merged as if they were weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.checkpoint.config import QUANTIZATION_KEYS, TEXT_KEYS
from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

ADVICE = (
    "pymerge does not merge quantised weights, float8 with scales apart: their codes mean nothing "
    "without their tables and scales. Use the unquantised model, or dequantise it and save it again"
)
_OTHER_CODES = "codes that are no float8"
#: (ending of one tensor, ending of its companion, what writes such a pair)
_PAIRS = (
    (".qweight", ".scales", "GPTQ or AWQ"),
    (".qweight", ".qzeros", "GPTQ or AWQ"),
    (".weight", ".weight.absmax", "bitsandbytes"),
    (".weight", ".SCB", "bitsandbytes"),
    (".weight_packed", ".weight_scale", "compressed-tensors"),
    (".weight_packed", ".weight_global_scale", "NVFP4 by compressed-tensors"),
    (".weight", ".weight_scale_2", "NVFP4"),
    (".weight", ".weight_zero_point", "codes with zero points"),
    ("_blocks", "_scales", "MXFP4"),
    (".weight", ".scale", _OTHER_CODES),
    ("", "_scale", _OTHER_CODES),
    ("", "_scale_inv", _OTHER_CODES),
)
#: Methods whose weights are float8 codes with scales, whatever else they say.
_FLOAT8_METHODS = ("fp8", "fbgemm_fp8")
_FLOAT8_FORMATS = ("float-quantized", "naive-quantized", "mixed-precision")


def refuse_quantized_config(reference: str, config: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError where config.json says that the weights are quantised."""
    if config is None:
        return
    nested = [config[key] for key in TEXT_KEYS if isinstance(config.get(key), dict)]
    for part in [config, *nested]:
        for key in QUANTIZATION_KEYS:
            settings = part.get(key)
            if not settings:
                continue
            if isinstance(settings, dict) and _is_float8(settings):
                continue
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise CheckpointError(
                f"model {shown(reference)}, config.json, field {key}: expected plain weights, "
                f"found quantisation {shown(method or 'of unknown method')}. {ADVICE}"
            )


def refuse_quantized_tensors(reference: str, tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError where tensor names show quantised weights that no config declares.

    Float8 with scales is no such case (``scaled.with_scales``).
    """
    for name, entry in tensors.items():
        if entry.format.is_float and not entry.format.name.startswith("F8"):
            continue
        for ending, companion_ending, method in _PAIRS:
            if not name.endswith(ending) or (entry.format.is_float and method == _OTHER_CODES):
                continue
            companion = name.removesuffix(ending) + companion_ending
            if companion in tensors:
                _refuse(reference, name, companion, method)


def _is_float8(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration says that the weights are float8 codes with scales."""
    method = settings.get("quant_method")
    if method == "modelopt":
        return str(settings.get("quant_algo", "")).upper().startswith("FP8")
    if method not in ("compressed-tensors", None):
        return method in _FLOAT8_METHODS
    groups = settings.get("config_groups")
    if settings.get("format") not in _FLOAT8_FORMATS or not isinstance(groups, dict) or not groups:
        return False
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return False
    return all(isinstance(group, dict) and _has_float8(group) for group in groups.values())


def _has_float8(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return False
    kind = weights.get("type"), weights.get("num_bits")
    return kind == ("float", 8) and bool(weights.get("symmetric", True))


def _refuse(reference: str, name: str, companion: str, method: str) -> None:
    raise CheckpointError(
        f"model {shown(reference)}: expected plain weights, found tensor {shown(name)} with its "
        f"{shown(companion)} ({method}). {ADVICE}"
    )
