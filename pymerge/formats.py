"""Element formats of safetensors files, and which of them the kernels read and write.

A leaf module: it imports nothing of pymerge, so that checkpoint, plan and ops can share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One safetensors element format.

    ``bits`` is the size of an element in bits (sub-byte formats exist), ``code`` the tag by which
    the kernels know it (``csrc/include/pymerge/format.h``) or None where the kernels do not read
    it, and ``writable`` whether a kernel can round to it.
    """

    name: str
    bits: int
    code: int | None = None
    writable: bool = False
    torch_name: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of one element; only for formats of whole bytes."""
        if self.bits % 8:
            raise ValueError(f"{self.name} has {self.bits} bits an element, not whole bytes")
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether kernels can read it as a floating-point number."""
        return self.code is not None


F64 = Format("F64", 64, 0, True, "float64")
F32 = Format("F32", 32, 1, True, "float32")
F16 = Format("F16", 16, 2, True, "float16")
BF16 = Format("BF16", 16, 3, True, "bfloat16")
F8_E4M3 = Format("F8_E4M3", 8, 4, False, "float8_e4m3fn")
F8_E5M2 = Format("F8_E5M2", 8, 5, False, "float8_e5m2")

#: Every format a safetensors header may name. Those without a code are copied, never computed on.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        F64,
        F32,
        F16,
        BF16,
        F8_E4M3,
        F8_E5M2,
        Format("F8_E8M0", 8),
        Format("F8_E4M3FNUZ", 8),
        Format("F8_E5M2FNUZ", 8),
        Format("F6_E2M3", 6),
        Format("F6_E3M2", 6),
        Format("F4", 4),
        Format("C64", 64),
        Format("I64", 64, torch_name="int64"),
        Format("U64", 64, torch_name="uint64"),
        Format("I32", 32, torch_name="int32"),
        Format("U32", 32, torch_name="uint32"),
        Format("I16", 16, torch_name="int16"),
        Format("U16", 16, torch_name="uint16"),
        Format("I8", 8, torch_name="int8"),
        Format("U8", 8, torch_name="uint8"),
        Format("BOOL", 8, torch_name="bool"),
    )
}

BY_CODE: dict[int, Format] = {f.code: f for f in FORMATS.values() if f.code is not None}
BY_TORCH_NAME: dict[str, Format] = {f.torch_name: f for f in FORMATS.values() if f.torch_name}


#: One bit for each element: a row of masks, which no header names.
BITS = Format("BITS", 1)
#: A kernel code for memory that is looked at as plain bytes.
BYTES = 4


def promote(formats: Iterable[Format]) -> Format:
    """The format in which a result of these inputs is written unless another is asked for.

    Their common one; of several, float64 if it is among them, else float32. A format that cannot be
    written counts only where no other is left.
    """
    found = set(formats)
    found = {format for format in found if format.writable} or found
    if len(found) == 1:
        return found.pop()
    return F64 if F64 in found else F32
