"""The tiles that every op is tested on, and guarded memory to lay them out in, here or on a device.

A tile is a part of a tensor: how many elements of which formats, what they are, how the memory is
aligned and where the tile starts in its tensor. Inputs and outputs lie between guard regions, and
outputs are poisoned before an op runs.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymerge.formats import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, Format
from pymerge.ops.view import View

Array = np.ndarray[Any, Any]

GUARD_BYTES = 64
POISON = 0xA5

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 99991)
ROW_LENGTHS = (1, 2, 7, 64, 1000, 4097)
WRITABLE = (F64, F32, F16, BF16)
READABLE = (*WRITABLE, F8_E4M3, F8_E5M2)
MIXED = READABLE

#: Ends of the formats' ranges and what is beyond them; the last two NaN have payloads, one signals.
SPECIAL = np.array(
    [
        *(np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-5, 1e-38),
        *(65504, 65519.996, 65520, 3.4e38, -3.4e38, 1.0, -1.0, 0.02, 448, 57344),
        *(np.nan, np.nan),
    ],
    np.float32,
)
SPECIAL[-2:] = np.array([0x7FA00001, 0xFFC12345], np.uint32).view(np.float32)

#: What an emulator is given at most.
SMALL = 1 << 16


@dataclass(frozen=True)
class Tile:
    """``small``: part of what slow emulators run. ``columns``: the length of the tile's rows."""

    num: int
    models: tuple[Format, ...] = (BF16,) * 4
    base: Format = BF16
    out: Format = BF16
    content: str = "normal"
    offset: int = 0
    start: int = 0
    columns: int = 0
    small: bool = False

    def __str__(self) -> str:
        names = "+".join(dict.fromkeys(f.name for f in self.models))
        size = f"n{self.num}" + (f"-columns{self.columns}" if self.columns else "")
        return (
            f"{size}-{len(self.models)}x{names}-base{self.base.name}-to{self.out.name}-"
            f"{self.content}-offset{self.offset}-start{self.start}"
        )

    @property
    def number(self) -> int:
        """A number of the tile's own, the same in every run."""
        return zlib.crc32(str(self).encode())


#: For ops that take any run of elements.
TILES = [
    *[Tile(num, small=num in (0, 1, 65)) for num in SIZES],
    *[Tile(num, content="special", offset=1, out=F16, start=3) for num in SIZES[:-1]],
    *[Tile(1025, (f, f), f, out, "special", 3) for f in READABLE for out in WRITABLE],
    *[Tile(613, MIXED, base, F32, "normal", 5, start=6) for base in READABLE],
    Tile(613, MIXED, BF16, BF16, "special", 5, start=2**31 - 300, small=True),
    *[Tile(777, (BF16,) * count) for count in (1, 2, 3, 16, 40)],
    Tile(300, (BF16, F32) * 8 + (F16,), F32, F32, "ties", 4, start=9, small=True),
    *[
        Tile(777, (F32, F16, BF16) * 6, F32, F32, content)
        for content in ("special", "ties", "zero")
    ],
    *[Tile(4097, content=content, out=F32) for content in ("special", "zero")],
    Tile(4097, content="ties", out=F32, offset=2, start=2**40 + 1, small=True),
    *[Tile(1541, content="ties", offset=7, start=start) for start in (5, 2**31 - 700, 2**34 - 6)],
]

#: For ops on whole rows.
ROW_TILES = [
    *[Tile(0, columns=columns) for columns in (1, 64)],
    *[
        Tile(rows * columns, (BF16,) * 3, columns=columns, start=rows, small=columns in (7, 64))
        for columns, rows in zip(ROW_LENGTHS, (33, 65, 18, 11, 3, 2), strict=True)
    ],
    *[
        Tile(3 * columns, (F32, F16), F32, F16, "special", 1, 2**31 + 5, columns)
        for columns in ROW_LENGTHS
    ],
    *[
        Tile(2 * columns, (BF16,) * 2, BF16, F32, content, 6, 3, columns, small=columns == 1000)
        for columns in (7, 1000, 4097)
        for content in ("ties", "zero")
    ],
    *[Tile(5 * 129, (f, f), f, F32, "special", 3, columns=129) for f in READABLE],
    *[Tile(5 * 129, (F32,) * 2, F32, out, "normal", 3, columns=129) for out in WRITABLE],
    Tile(3 * 65, MIXED, BF16, BF16, "normal", 5, 2**40 + 2, 65, small=True),
    Tile(4 * 31, (BF16,) * 17, columns=31),
    Tile(13 * 7691, (BF16,) * 2, columns=7691, out=F32),
    Tile(2 * 30011, (BF16,), columns=30011, content="ties", out=F32),
]

#: For products of factors, which may start inside a row: ``start`` far beyond 2**31 as well.
LORA_TILES = [
    *[Tile(num, (BF16,), columns=97, start=41, small=num in (0, 1, 513)) for num in SIZES],
    *[Tile(1025, (f,), f, F32, "special", 3, 7, 64) for f in READABLE],
    *[Tile(1025, (F32,), F32, out, "special", 1, 0, 333) for out in WRITABLE],
    *[Tile(70, (BF16,), columns=columns, start=5, out=F32) for columns in (1, 2, 7, 4097)],
    Tile(5000, (BF16,), columns=1 << 20, start=2**31 - 2400, out=F32),
    Tile(700, (F16,), columns=1 << 20, start=2**31 + 2**20 - 350, out=F32, offset=2, small=True),
]


@functools.lru_cache(maxsize=512)
def numbers(num: int, content: str, model: int) -> Array:
    """The elements of model number ``model``, or of the base for -1, as float32."""
    rng_of_base, rng = (np.random.default_rng(key) for key in ([num, 0], [num, 1, model + 1]))
    base = rng_of_base.normal(0, 0.02, num).astype(np.float32)
    if content == "special":
        special = rng_of_base.random(num) < 0.3
        base = np.where(special, rng_of_base.choice(SPECIAL, num), base)
    if model < 0 or content == "zero":
        return base
    if content == "ties":
        steps = np.array([0, 0.5, -0.5, 1, -1], np.float32)
        return base + rng.choice(steps, num)
    with np.errstate(invalid="ignore"):
        values = base + rng.normal(0, 1e-3, num).astype(np.float32)
    if content == "special":
        values = np.where(rng.random(num) < 0.1, rng.choice(SPECIAL, num), values)
    return values


def encode(values: Array, format: Format) -> bytes:
    """Some bytes of a format near the values; how they round does not matter here."""
    with np.errstate(all="ignore"):
        if format is F64:
            # Not only numbers that are float32 already: the ops must round them.
            return (values.astype(np.float64) * (1 + 1e-9)).tobytes()
        if format is F32:
            return values.tobytes()
        if format is F16:
            return values.astype(np.float16).tobytes()
    if format is BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    # For 8 bits: some of the 256 patterns, the same for the same value.
    return (values.view(np.uint32) >> 20).astype(np.uint8).tobytes()


class Guarded:
    """Elements at a chosen misalignment, between two guard regions, poisoned until written.

    ``device`` (pymerge.ops.device.Device): where the memory is; None is the host.
    """

    def __init__(
        self,
        format: Format,
        num: int,
        offset: int,
        payload: bytes | None = None,
        device: Any = None,
    ) -> None:
        begin = GUARD_BYTES + offset
        length = begin + num * format.num_bytes + GUARD_BYTES
        self.format = format
        self._owner = np.empty(length + 64, np.uint8)
        first = -self._owner.ctypes.data % 64
        self._host = self._owner[first : first + length]
        self._host[:] = POISON
        self._payload = slice(begin, begin + num * format.num_bytes)
        if payload is not None:
            self._host[self._payload] = np.frombuffer(payload, np.uint8)
        self._at_first = self._host.copy()
        self._device, address = device, self._host.ctypes.data
        if device is not None:
            self._buffer = device.buffer(length)
            stream = device.stream()
            stream.copy_in(self._buffer.ptr, address, length)
            stream.synchronize()
            address = self._buffer.ptr
        assert format.code is not None
        self.view = View(address + begin, format.code, num)

    @property
    def memory(self) -> Array:
        """All bytes as they are now, guards included."""
        if self._device is not None:
            stream = self._device.stream()
            stream.copy_out(self._host.ctypes.data, self._buffer.ptr, len(self._host))
            stream.synchronize()
        return self._host

    @property
    def payload(self) -> Array:
        """The elements' bits as unsigned integers; fails if a guard was touched."""
        self.check_guards()
        carrier = np.dtype(f"u{self.format.num_bytes}")
        return self._host[self._payload].copy().view(carrier)

    def check_guards(self) -> None:
        found, expected = self.memory.copy(), self._at_first.copy()
        found[self._payload] = expected[self._payload] = 0
        check_same(found, expected, "guard region")

    def check_untouched(self) -> None:
        check_same(self.memory, self._at_first, "input")


class Memory:
    """The guarded inputs of a tile."""

    def __init__(self, tile: Tile, device: Any = None) -> None:
        self.tile = tile
        self.device = device
        self.base = self.guarded(tile.base, encode(self.numbers(-1), tile.base), tile.offset)
        self.models = [
            self.guarded(f, encode(self.numbers(i), f), (tile.offset * (i + 1)) % 64)
            for i, f in enumerate(tile.models)
        ]
        self._more: list[Guarded] = []

    def numbers(self, model: int) -> Array:
        return numbers(self.tile.num, self.tile.content, model)

    def guarded(self, format: Format, payload: bytes, offset: int) -> Guarded:
        num = len(payload) // format.num_bytes
        return Guarded(format, num, offset, payload, self.device)

    @property
    def views(self) -> list[View]:
        return [model.view for model in self.models]

    def output(self, format: Format | None = None) -> Guarded:
        return Guarded(format or self.tile.out, self.tile.num, self.tile.offset, None, self.device)

    def score(self) -> Guarded:
        """float32 magnitudes of the tile's own kind, an input."""
        values = np.abs(self.numbers(len(self.models)))
        self._more.append(self.guarded(F32, values.astype(np.float32).tobytes(), 4))
        return self._more[-1]

    def bits(self, count: int) -> list[Guarded]:
        """Random packed bits, an input; those past the last element are set."""
        rng = np.random.default_rng([self.tile.num, 7])
        length = -(-self.tile.num // 8)
        masks = []
        for i in range(count):
            packed = rng.integers(0, 256, length, np.uint8)
            if self.tile.num % 8:
                packed[-1] |= 0xFF << self.tile.num % 8 & 0xFF
            masks.append(self.guarded(F8_E4M3, packed.tobytes(), (i + self.tile.offset) % 64))
        self._more += masks
        return masks

    def poisoned_bits(self) -> list[Guarded]:
        """Room for the packed bits of each model, an output."""
        length = -(-self.tile.num // 8)
        return [
            Guarded(F8_E4M3, length, (i + self.tile.offset) % 64, None, self.device)
            for i in range(len(self.models))
        ]

    def check_untouched(self) -> None:
        for part in (self.base, *self.models, *self._more):
            part.check_untouched()


def check_same(found: Any, expected: Any, what: str) -> None:
    """Bitwise equality of two arrays or numbers; AssertionError tells the first byte that
    differs."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise AssertionError(
            f"{what}: {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        )
    different = np.flatnonzero(
        found.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8)
    )
    if len(different):
        element = int(different[0]) // found.itemsize
        index = np.unravel_index(element, found.shape)
        digits = 2 * found.itemsize
        raise AssertionError(
            f"{what}: {len(different)} bytes differ, first byte {different[0]} at index "
            f"{tuple(int(i) for i in index)}: found {found.flat[element]} "
            f"(0x{int.from_bytes(found.flat[element].tobytes(), 'little'):0{digits}x}), "
            f"expected {expected.flat[element]} "
            f"(0x{int.from_bytes(expected.flat[element].tobytes(), 'little'):0{digits}x})"
        )


def masks_at(masks: Sequence[Guarded]) -> list[int]:
    return [mask.view.ptr for mask in masks]
