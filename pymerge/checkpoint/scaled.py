"""Float8 codes with scales: which tensors of a checkpoint belong together and what they mean.

A weight [..., rows, columns] is stored as codes of its shape (``X.weight``) and scales beside it:
one for all (a scalar or one element), one for each row ([rows] or [rows, 1]), or one for each block
of ``block_rows`` by ``block_columns`` elements, the last block of a row or column being shorter
([ceil(rows / block_rows), ceil(columns / block_columns)]). Whatever the scale is called, it is what
the codes are multiplied by:

    value = code * scale            in float32, each a float32 before

``weight_scale_inv`` is no exception: it is the inverse of what the weight was multiplied by when it
was quantised (transformers, ``finegrained_fp8``). Scales are floats of any size, or exponents of
two in one byte (E8M0; so are those in U8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymerge.checkpoint.config import DTYPE_KEYS, QUANTIZATION_KEYS, TEXT_KEYS
from pymerge.checkpoint.derived import DerivedTensor
from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError
from pymerge.formats import BF16, BY_TORCH_NAME, F32, Format

#: Formats of scales that are exponents of two: 2^(byte - 127), 255 is no number.
EXPONENTS = ("F8_E8M0", "U8")
#: What a scale adds to the name of its codes, or has in place of ``weight``.
_ADDED = ("_scale_inv", "_scale")
_INSTEAD = ("scale", "scale_weight", "qscale_weight")
#: Last parts of the names of scales that are not the weights': of activations and of caches, and
#: bounds for them.
_OTHER_SCALES = (
    "input_scale",
    "activation_scale",
    "output_scale",
    "input_scale_ub",
    "weight_scale_ub",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "scale_input",
    "qscale_act",
)
_DEFAULT_BLOCK = 128
_ADVICE = "copy or download the model again, or dequantise it with the tool that wrote it"


@dataclass(frozen=True, eq=False)
class ScaledTensor(DerivedTensor):
    """float32 [..., rows, columns]: ``stored`` are the codes and the scales. Each scale is that of
    ``block_rows`` by ``block_columns`` elements; one for a whole tensor has the tensor as block.
    """

    block_rows: int
    block_columns: int

    @property
    def codes(self) -> TensorEntry:
        return self.stored[0]

    @property
    def scales(self) -> TensorEntry:
        return self.stored[1]

    @property
    def rows(self) -> int:
        """Rows of one matrix; a vector is one row."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the scales of one matrix."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    @property
    def storage(self) -> str:
        """How it is stored, in words."""
        count = self.scales.num_elements
        each = f"{self.block_rows}x{self.block_columns}"
        what = "one scale" if count == 1 else f"{count} scales ({each} elements each)"
        return f"{self.codes.format.name} with {what}"

    def fingerprint(self) -> str:
        return f"{self.block_rows}x{self.block_columns}"


def with_scales(
    reference: str, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any] | None
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """The tensors, those of float8 codes with scales as the weights that they mean and the scales
    gone; and sentences about what was left out.

    :raises CheckpointError: scales do not fit their codes.
    """
    found: dict[str, TensorEntry] = {}
    used: set[str] = set()
    nominal = _nominal(config)
    bare = 0
    for name, entry in tensors.items():
        if entry.format.name not in ("F8_E4M3", "F8_E5M2") or name in used:
            continue
        scales = _scales_of(name, tensors)
        if scales is None:
            bare += 1
            continue
        found[name] = _scaled(reference, entry, tensors[scales], nominal, _block(config))
        used.add(scales)
    if not found:
        return dict(tensors), ()
    others = {name for name in tensors if _is_other_scale(name)} - found.keys() - used
    kept = {n: found.get(n, e) for n, e in tensors.items() if n not in used and n not in others}
    warnings = []
    if others:
        warnings.append(
            f"{reference} is quantised: {len(others)} scales of activations and caches are left "
            f"out, since the output is not ({min(others)}, …)"
        )
    if bare:
        warnings.append(
            f"{reference} is quantised, but {bare} of its float8 tensors have no scales: they are "
            "taken as they are"
        )
    return kept, tuple(warnings)


def _nominal(config: Mapping[str, Any] | None) -> Format:
    """The format that the weights had before: the configuration's, else bfloat16."""
    parts = [config or {}]
    parts += [parts[0][key] for key in TEXT_KEYS if isinstance(parts[0].get(key), dict)]
    names = [part.get(key) for part in parts for key in DTYPE_KEYS]
    formats = [BY_TORCH_NAME.get(name) for name in names if isinstance(name, str)]
    return next((f for f in formats if f is not None and f.writable), BF16)


def _block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Rows and columns of a block by the configuration."""
    for key in QUANTIZATION_KEYS:
        settings = (config or {}).get(key)
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        if isinstance(size, list) and [type(n) for n in size] == [int, int] and min(size) > 0:
            return size[0], size[1]
    return _DEFAULT_BLOCK, _DEFAULT_BLOCK


def _scales_of(name: str, tensors: Mapping[str, TensorEntry]) -> str | None:
    """The name of the scales of a tensor of codes."""
    module, _, last = name.rpartition(".")
    names = [name + ending for ending in _ADDED]
    names += [f"{module}.{other}" for other in _INSTEAD if last == "weight"]
    return next((each for each in names if each in tensors), None)


def _is_other_scale(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in _OTHER_SCALES or last.endswith(("_input_scale", "_activation_scale"))


def _scaled(
    reference: str,
    codes: TensorEntry,
    scales: TensorEntry,
    nominal: Format,
    block: tuple[int, int],
) -> ScaledTensor:
    if not scales.format.is_float and scales.format.name not in EXPONENTS:
        raise _unfit(reference, scales, "floats or exponents of two", scales.format.name)
    return ScaledTensor(
        codes.name,
        F32,
        codes.shape,
        codes.file,
        codes.offset,
        math.prod(codes.shape) * F32.num_bytes,
        (codes, scales),
        nominal,
        *_block_of(reference, codes, scales, block),
    )


def _block_of(
    reference: str, codes: TensorEntry, scales: TensorEntry, block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the elements that share one scale."""
    *outer, rows, columns = (1, 1, *codes.shape)[-max(2, len(codes.shape)) :]
    if scales.num_elements == 1:
        return max(1, rows), max(1, columns)
    grid = scales.shape
    matrices = math.prod(outer)
    if grid == (rows,) and len(codes.shape) == 2:
        return 1, max(1, columns)
    if len(grid) == 1 and outer and grid == (matrices,):
        return max(1, rows), max(1, columns)
    across = along = None
    if len(grid) == len(codes.shape) and len(grid) >= 2 and list(grid[:-2]) == outer:
        across = _size(rows, grid[-2], block[0])
        along = _size(columns, grid[-1], block[1])
    if across is not None and along is not None:
        return across, along
    raise _unfit(
        reference,
        scales,
        f"one scale, one for each row, or one for each {block[0]} by {block[1]} elements of "
        f"{shown(codes.name)} {list(codes.shape)}",
        f"shape {list(grid)}",
    )


def _size(length: int, count: int, block: int) -> int | None:
    """Elements of a block of which ``count`` cover a length, the last perhaps in part."""
    if count == 1:
        return max(1, length)
    if -(-length // block) == count:
        return block
    # transformers, too, goes by the scales where they divide the weight.
    return length // count if count and length % count == 0 and length else None


def _unfit(reference: str, entry: TensorEntry, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"model {shown(reference)}, tensor {shown(entry.name)}: expected {expected}, found "
        f"{found}; {_ADVICE}"
    )
