"""Element formats against torch: every 8- and 16-bit pattern, and rounding at all midpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pymerge import ops
from pymerge.errors import PymergeError
from pymerge.formats import BF16, BY_TORCH_NAME, F8_E4M3, F8_E5M2, F16, F32
from pymerge.ops import cpu, reference, view

BACKENDS = (cpu, reference)
HALVES = {torch.bfloat16: BF16, torch.float16: F16}


def to_float32(backend: Any, patterns: torch.Tensor) -> np.ndarray[Any, Any]:
    out = np.empty(patterns.numel(), np.float32)
    backend.convert(view(out), view(patterns))
    return out


def round_to(backend: Any, x: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    out = torch.empty(x.size, dtype=dtype)
    backend.convert(view(out), view(np.ascontiguousarray(x)))
    return out.view(torch.int16).numpy().copy()


def canonical(halves: torch.Tensor) -> np.ndarray[Any, Any]:
    """Bit patterns with every NaN as the positive quiet one."""
    quiet = 0x7FC0 if halves.dtype == torch.bfloat16 else 0x7E00
    bits = halves.view(torch.int16).clone()
    bits[halves.isnan()] = quiet
    return bits.numpy()


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.rsplit(".")[-1])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_every_pattern_decodes_as_in_torch(
    backend: Any, dtype: torch.dtype, isa: str, same_bytes: Any
) -> None:
    if dtype.itemsize == 2:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    else:
        patterns = torch.arange(0, 256).to(torch.uint8).view(dtype)
    expected = patterns.float()
    expected[expected.isnan()] = torch.nan
    same_bytes(to_float32(backend, patterns), expected.numpy(), str(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_pattern_survives_a_round_trip(dtype: torch.dtype, isa: str, same_bytes: Any) -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    back = round_to(cpu, to_float32(cpu, patterns), dtype)
    same_bytes(back, canonical(patterns), str(dtype))


def hard_to_round(dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Random float32 patterns; every 16-bit number, the midpoints between them, and neighbours."""
    random = np.random.default_rng(7).integers(0, 2**32, 200_000, dtype=np.uint32)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    exact = numbers[numbers.isfinite()].double()
    magnitude = exact.abs().numpy()
    step = np.diff(np.unique(magnitude), append=np.nan)
    gap = step[np.searchsorted(np.unique(magnitude), magnitude)]
    gap = np.where(np.isnan(gap), np.nanmax(gap), gap)
    with np.errstate(over="ignore"):
        midpoint = np.copysign(magnitude + gap / 2, exact.numpy()).astype(np.float32)
    bits = midpoint.view(np.int32)
    around = np.concatenate([bits, bits - 1, bits + 1, exact.float().numpy().view(np.int32)])
    return np.concatenate([random, around.view(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_that_of_torch(
    backend: Any, dtype: torch.dtype, isa: str, same_bytes: Any
) -> None:
    x = hard_to_round(dtype)
    expected = canonical(torch.from_numpy(x.copy()).to(dtype))
    same_bytes(round_to(backend, x, dtype), expected, str(dtype))


def test_float64_is_rounded_once_to_float32(isa: str, same_bytes: Any) -> None:
    rng = np.random.default_rng(3)
    x = np.ldexp(rng.normal(size=50_000), rng.integers(-160, 140, 50_000))
    halfway = (rng.normal(size=1000).astype(np.float32).view(np.int32) & ~1).view(np.float32)
    above = np.nextafter(halfway, np.float32(np.inf)).astype(np.float64)
    x = np.concatenate([x, (halfway.astype(np.float64) + above) / 2, [1e300, -1e-60, np.inf]])
    out = np.empty(x.size, np.float32)
    ops.convert(view(out), view(x))
    with np.errstate(all="ignore"):
        same_bytes(out, x.astype(np.float32), "float32 of float64")


def test_equal_formats_are_copied_with_payloads(isa: str, same_bytes: Any) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    out = np.zeros_like(patterns)
    assert ops.convert(view(out, BF16), view(patterns, BF16)) == 2 * 128
    same_bytes(out, patterns, "bfloat16")
    wide = np.array([1e300, np.inf, -0.0, np.nan])
    copy = np.zeros_like(wide)
    assert ops.convert(view(copy), view(wide)) == 2
    same_bytes(copy, wide, "float64")


def test_float8_is_copied_but_never_rounded_to(isa: str, same_bytes: Any) -> None:
    patterns = np.arange(256, dtype=np.uint8)
    out = np.zeros_like(patterns)
    assert ops.convert(view(out, F8_E4M3), view(patterns, F8_E4M3)) == 2
    assert ops.convert(view(out, F8_E5M2), view(patterns, F8_E5M2)) == 8
    same_bytes(out, patterns, "float8")
    with pytest.raises(PymergeError, match="cannot round to F8_E4M3"):
        ops.convert(view(out, F8_E4M3), view(np.zeros(256, np.float32)))


def test_overflow_is_counted_after_rounding(isa: str) -> None:
    x = np.array([65519.0, 65520.0, 3.39e38, np.float32(3.4e38), np.inf, np.nan], np.float32)
    counts = {}
    for format in (F16, BF16, F32):
        out = torch.empty(x.size, dtype=getattr(torch, format.torch_name or ""))
        counts[format.name] = ops.convert(view(out), view(x))
        assert counts[format.name] == int((~out.isfinite()).sum())
    assert counts == {"F16": 5, "BF16": 3, "F32": 2}


def test_subnormals_survive_a_flushing_caller(isa: str, same_bytes: Any) -> None:
    """A library linked with -ffast-math flushes subnormals for the whole thread; ops do not."""
    x = np.array([1e-45, -1e-40, 1e-39], np.float32)
    base = np.array([1e-38, 1e-38, 1e-38], np.float32)
    out, expected = np.empty_like(x), np.empty_like(x)
    reference.axpy_n(view(expected), [view(x)], [0.5], base=view(base))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        ops.axpy_n(view(out), [view(x)], [0.5], base=view(base))
        still_flushing = float(torch.tensor(1e-40) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    same_bytes(out, expected, "subnormals")
    assert still_flushing


def test_views_of_torch_and_numpy_agree() -> None:
    tensor = torch.arange(5, dtype=torch.float16)
    assert view(tensor) == view(tensor.numpy())
    assert view(tensor.to(torch.bfloat16)).code == BF16.code
    for name, format in BY_TORCH_NAME.items():
        if format.is_float:
            assert view(torch.empty(3, dtype=getattr(torch, name)))[1:] == (format.code, 3)
