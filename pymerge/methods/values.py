"""A single value checked against the specification of its parameter.

A leaf module: it knows neither recipes nor tensors, so that both entries take the same values.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from pymerge.methods.spec import ParameterSpec, ParameterValue
from pymerge.names import shown

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}

#: Half a unit above the largest float32: from here on rounding gives infinity.
_FLOAT32_OVERFLOW = 2.0**128 - 2.0**103


def check_value(raw: Any, spec: ParameterSpec) -> ParameterValue:
    """The value in the kind of its spec; ValueError with a sentence.

    Numbers may be given as text, switches as 0, 1 or words. A number must be finite in float32, the
    type that kernels compute in.
    """
    if spec.kind == "bool":
        return _boolean(raw, spec)
    if spec.kind == "str":
        return _word(raw, spec)
    return _number(raw, spec)


def _boolean(raw: Any, spec: ParameterSpec) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, Real) and raw in (0, 1):
        return bool(raw)
    if isinstance(raw, str) and raw.strip().lower() in _WORDS:
        return _WORDS[raw.strip().lower()]
    raise ValueError(f"{spec.name} is true or false, found {shown(raw)}")


def _word(raw: Any, spec: ParameterSpec) -> str:
    if not isinstance(raw, str) or (spec.choices and raw not in spec.choices):
        choices = f" out of {', '.join(spec.choices)}" if spec.choices else ""
        raise ValueError(f"{spec.name} is a word{choices}, found {shown(raw)}")
    return raw


def _number(raw: Any, spec: ParameterSpec) -> float | int:
    expected = f"{spec.name} is {'a whole number' if spec.kind == 'int' else 'a number'}"
    if isinstance(raw, bool) or not isinstance(raw, (Real, str)):
        raise ValueError(f"{expected}, found {shown(raw)}")
    value: float | int
    try:
        # An int stays one: a float holds whole numbers exactly only up to 2**53.
        value = int(raw) if isinstance(raw, Integral) and spec.kind == "int" else float(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"{expected}, found {shown(raw)}") from None
    if not isinstance(value, int):
        if not math.isfinite(value):
            raise ValueError(f"{expected} and finite, found {shown(raw)}")
        if spec.kind == "int":
            if not value.is_integer():
                raise ValueError(f"{expected}, found {shown(raw)}")
            value = int(value)
    if spec.minimum is not None and value < spec.minimum:
        raise ValueError(f"{spec.name} is at least {spec.minimum:g}, found {shown(raw)}")
    if spec.maximum is not None and value > spec.maximum:
        raise ValueError(f"{spec.name} is at most {spec.maximum:g}, found {shown(raw)}")
    if spec.kind == "float" and abs(value) >= _FLOAT32_OVERFLOW:
        raise ValueError(f"{expected} and finite in float32, found {shown(raw)}")
    return value
