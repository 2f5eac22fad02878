"""Recognising quantised checkpoints, whose codes must not be merged as if they were weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.checkpoint.config import QUANTIZATION_KEYS, TEXT_KEYS
from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

ADVICE = (
    "pymerge does not merge quantised weights: their codes mean nothing without their scales. "
    "Use the unquantised model, or dequantise it and save it again"
)
#: (ending of one tensor, ending of its companion, what writes such a pair)
_PAIRS = (
    (".qweight", ".scales", "GPTQ or AWQ"),
    (".weight", ".weight.absmax", "bitsandbytes"),
    (".weight", ".SCB", "bitsandbytes"),
    (".weight_packed", ".weight_scale", "compressed-tensors"),
    ("_blocks", "_scales", "MXFP4"),
)
_SCALE_ENDINGS = ("_scale", "_scale_inv")


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
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise CheckpointError(
                f"model {shown(reference)}, config.json, field {key}: expected plain weights, "
                f"found quantisation {shown(method or 'of unknown method')}. {ADVICE}"
            )


def refuse_quantized_tensors(reference: str, tensors: Mapping[str, TensorEntry]) -> None:
    """Raise CheckpointError where tensor names show quantised weights that no config declares."""
    for name, entry in tensors.items():
        for ending, companion_ending, method in _PAIRS:
            companion = name.removesuffix(ending) + companion_ending
            if name.endswith(ending) and companion in tensors and not _is_plain(entry):
                _refuse(reference, name, companion, method)
        if entry.format.name.startswith("F8"):
            for ending in _SCALE_ENDINGS:
                if name + ending in tensors:
                    _refuse(reference, name, name + ending, "float8 with scales")


def _is_plain(entry: TensorEntry) -> bool:
    return entry.format.is_float and not entry.format.name.startswith("F8")


def _refuse(reference: str, name: str, companion: str, method: str) -> None:
    raise CheckpointError(
        f"model {shown(reference)}: expected plain weights, found tensor {shown(name)} with its "
        f"{shown(companion)} ({method}). {ADVICE}"
    )
