"""read_header: each rule broken once, with what the message must say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pymerge.checkpoint import read_header
from pymerge.errors import CheckpointError


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_reads_what_the_library_wrote(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.int64),
        "empty": np.zeros((0, 5), np.float16),
        "scalar": np.array(2.5),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "np"}
    assert header.file_bytes == len(raw)
    assert header.mtime_ns == path.stat().st_mtime_ns
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    assert header.sha256 == hashlib.sha256(raw[:header_bytes]).hexdigest()
    assert header.tensors.keys() == arrays.keys()
    offsets = [entry.offset for entry in header.tensors.values()]
    assert offsets == sorted(offsets)
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert entry.name == name
        assert entry.file == path
        assert entry.shape == array.shape
        assert entry.num_elements == array.size
        assert raw[entry.offset : entry.offset + entry.num_bytes] == array.tobytes()


def test_never_reads_past_the_header(tmp_path, packed_tensors, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed_tensors({"a": ("F32", [1000])}))
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    pread, reached = os.pread, []

    def watched(descriptor, num_bytes, offset):
        reached.append(num_bytes + offset)
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", watched)
    read_header(path)
    assert max(reached) == end


def test_short_reads_are_continued(tmp_path, packed_tensors, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed_tensors({"a": ("F32", [10])}))
    expected = read_header(path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 3), offset))
    assert read_header(path) == expected


BROKEN = {
    "dtype unknown": (one(dtype="F31"), 8, ["'w'", "dtype", "'F31'", "BF16"]),
    "dtype no string": (one(dtype=["F32"]), 8, ["'w'", "dtype"]),
    "shape negative": (one(shape=[-2]), 8, ["'w'", "shape", "[-2]"]),
    "shape bool": (one(shape=[True, 2]), 8, ["shape", "[True, 2]"]),
    "shape float": (one(shape=[2.0]), 8, ["shape", "[2.0]"]),
    "shape no list": (one(shape=2), 8, ["shape", "found 2"]),
    "shape overflows": (one(shape=[2**40, 2**40]), 8, ["shape", "bits"]),
    "shape overflows beside zero": (one(shape=[0, 2**40, 2**40], offsets=[0, 0]), 0, ["shape"]),
    "shape of 65 dimensions": (one(shape=[1] * 65, offsets=[0, 4]), 4, ["64 dimensions", "65"]),
    "shape number of 5000 digits": (
        '{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}',
        8,
        ["shape"],
    ),
    "shape minus zero": ('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, ["[-0]"]),
    "offsets swapped": (
        one(offsets=[8, 0]),
        8,
        ["data_offsets", "begin at or before end", "[8, 0]"],
    ),
    "offsets negative": (one(offsets=[-8, 0]), 8, ["data_offsets", "[-8, 0]"]),
    "offsets float": (one(offsets=[0, 8.0]), 8, ["data_offsets", "[0, 8.0]"]),
    "offsets bool": (one(offsets=[False, 8]), 8, ["data_offsets", "[False, 8]"]),
    "offsets three": (one(offsets=[0, 4, 8]), 8, ["data_offsets"]),
    "offsets past the file": (one(shape=[4], offsets=[0, 16]), 8, ["8 missing", "cut short"]),
    "size and shape differ": (one(offsets=[0, 4]), 4, ["data_offsets", "64 bits", "32 bits"]),
    "field missing": ({"w": {"dtype": "F32", "shape": [2]}}, 8, ["'w'", "data_offsets"]),
    "field too many": ({"w": {**one()["w"], "stride": [1]}}, 8, ["'w'", "stride"]),
    "entry no object": ({"w": [1]}, 8, ["'w'", "an object"]),
    "name empty": ({"": one()["w"]}, 8, ["name", "non-empty"]),
    "name half a surrogate": ('{"\\ud800":{}}', 0, ["name", "UTF-8"]),
    "gap": (one(offsets=[4, 12]), 12, ["'w'", "a gap", "begins at 4"]),
    "trailing bytes": (one(), 9, ["1 bytes after it"]),
    "overlap": (
        {**one(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        12,
        ["'v'", "an overlap"],
    ),
    "same bytes twice": ({**one(), "v": one()["w"]}, 8, ["'v'", "an overlap"]),
    "sub-byte format": (one(dtype="F4", shape=[3], offsets=[0, 1]), 1, ["12 bits", "8 bits"]),
    "metadata list": ({"__metadata__": []}, 0, ["__metadata__", "an object"]),
    "metadata null": ({"__metadata__": None}, 0, ["__metadata__", "an object"]),
    "metadata number": ({"__metadata__": {"k": 1}}, 0, ["__metadata__", "'k'", "a string"]),
    "key twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, ["'__metadata__' twice"]),
    "NaN": (b'{"w":NaN}', 0, ["NaN"]),
    "array": (b"[]", 0, ["JSON object"]),
    "no JSON": (b"{hello}", 0, ["JSON object"]),
    "space before": (b" {}", 0, ["from its first byte"]),
    "newline after": (b"{}\n", 0, ["only spaces"]),
    "zero bytes after": (b"{}\0\0", 0, ["only spaces"]),
    "two objects": (b"{}{}", 0, ["JSON object"]),
    "not UTF-8": (b'{"\xff":1}', 0, ["UTF-8"]),
    "nested deeply": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0, ["nested too deeply"]),
    "nested enough to hurt repr": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", 0, ["an object"]),
}


@pytest.mark.parametrize(("header", "num_bytes", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_refuses(tmp_path, packed, header, num_bytes, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(packed(header, bytes(num_bytes)))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "expected" in message
    assert "found" in message
    assert len(message) < 1000
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["at least 8 bytes", "found 0"]),
        (b"1234567", ["at least 8 bytes", "found 7"]),
        (bytes(4096), ["unfinished output", "resume"]),
        ((10**9).to_bytes(8, "little") + b"{}", ["at most 100000000", "1000000000"]),
        ((3).to_bytes(8, "little") + b"{}", ["cut short", "found 3"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        (b"PK\x03\x04" + bytes(20), ["zip"]),
        (b"GGUF" + bytes([1] * 20), ["GGUF"]),
    ],
)
def test_refuses_files_that_are_something_else(tmp_path, content, words):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for word in words:
        assert word in str(caught.value)


def test_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe.safetensors", Path("a\0b")):
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.parametrize("dtype", ["F64", "BF16", "F8_E4M3", "F4", "C64", "BOOL"])
def test_accepts_every_kind_of_format(tmp_path, packed, dtype):
    bits = {"F64": 64, "BF16": 16, "F8_E4M3": 8, "F4": 4, "C64": 64, "BOOL": 8}[dtype]
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed(one(dtype, [2, 1], [0, bits // 4]), bytes(bits // 4)))
    entry = read_header(path).tensors["w"]
    assert (entry.format.name, entry.num_elements) == (dtype, 2)


def test_accepts_padding_any_order_and_no_tensors(tmp_path, packed):
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed("{}   "))
    assert read_header(path).tensors == {}
    fields = {
        "late": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]},
        "none": {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]},
        "early": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    path.write_bytes(packed(fields, b"abcd"))
    assert list(read_header(path).tensors) == ["early", "none", "late"]
