"""Mutated headers and indices: a CheckpointError or a correct reading, never anything else.

PYMERGE_FUZZ_EXAMPLES sets how many examples the quick tests try in all.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from pymerge.checkpoint import open_checkpoint, read_header
from pymerge.errors import CheckpointError

QUICK = int(os.environ.get("PYMERGE_FUZZ_EXAMPLES", "300"))
SLOW = 5000
NUM_TESTS = 3


def fuzz(examples):
    return settings(
        max_examples=max(1, -(-examples // NUM_TESTS)),
        deadline=timedelta(seconds=10),
        suppress_health_check=list(HealthCheck),
    )


class Raw(str):
    """JSON text to be written as it is."""


class Pairs(list):
    """A JSON object as (key, value) pairs, so that keys can occur twice and be of any type."""


def encode(node) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{encode(key)}:{encode(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(encode, node)) + "]"
    return json.dumps(node)


def tree(value):
    if isinstance(value, dict):
        return Pairs((key, tree(item)) for key, item in value.items())
    return [tree(item) for item in value] if isinstance(value, list) else value


HEADER = tree(
    {
        "__metadata__": {"format": "pt"},
        "layer.0.weight": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
        "layer.0.bias": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [28, 28]},
        "码本": {"dtype": "F4", "shape": [2, 3], "data_offsets": [28, 31]},
    }
)
DATA = bytes(range(31))
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": ("F32", [3]), "b": ("BF16", [2])},
    "model-00002-of-00002.safetensors": {"c": ("U8", [5])},
}
INDEX = tree(
    {
        "metadata": {"total_size": 21},
        "weight_map": {name: file for file, tensors in SHARDS.items() for name in tensors},
    }
)

ODD_VALUES = st.one_of(
    st.sampled_from(
        [
            *map(Raw, ["-0", "1e400", "1E2", "NaN", "-Infinity", "9" * 5000, "[" * 100_000, "{"]),
            Raw('{"a":' * 5000 + "1" + "}" * 5000),
            Raw('"\\ud83d"'),
            Raw('"\\u0000"'),
            Raw('"\x01"'),
            Raw(" \t\n1"),
        ]
    ),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.sampled_from(
        [
            *[
                "F32",
                "F64",
                "F4",
                "U8",
                "..",
                "../x",
                "/etc/passwd",
                "",
                "a/b",
                "C:\\x",
                "x" * 5000,
            ],
            *SHARDS,
        ]
    ),
    st.just([]),
    st.builds(Pairs),
    st.lists(st.integers(0, 40), max_size=4),
)


def paths(node, prefix=()):
    """The way to every node below this one: a place in each list or object on the way."""
    for place, item in enumerate(node):
        value = item[1] if isinstance(node, Pairs) else item
        yield (*prefix, place)
        if isinstance(value, list):
            yield from paths(value, (*prefix, place))


def changed(node, path, kind, value):
    """The tree with one node changed."""
    items = type(node)(node)
    place, *rest = path
    key, item = items[place] if isinstance(node, Pairs) else (None, items[place])
    if rest:
        item = changed(item, rest, kind, value)
    elif kind == "drop":
        del items[place]
        return items
    elif kind == "twice":
        items.append(items[place])
    elif kind == "swap":
        items[place], items[0] = items[0], items[place]
        return items
    elif kind == "nudge" and isinstance(item, int):
        item += 1 if value else -1
    elif kind == "key" and key is not None:
        key = value
    else:
        item = value
    items[place] = (key, item) if isinstance(node, Pairs) else item
    return items


KINDS = st.sampled_from(["value", "key", "drop", "twice", "swap", "nudge"])


@st.composite
def mutated_trees(draw, root):
    if draw(st.integers(0, 49)) == 0:
        return draw(ODD_VALUES)
    node = root
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(node))
        if places:
            node = changed(node, draw(st.sampled_from(places)), draw(KINDS), draw(ODD_VALUES))
    return node


@st.composite
def mutated_bytes(draw, original):
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        # The length and the first bytes of the JSON deserve more than their share.
        end = draw(st.sampled_from([9, 40, len(data)]))
        place = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "delete", "set"]))
        if kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del data[place : place + draw(st.integers(1, 9))]
        elif data:
            flip = data[place] ^ (1 << draw(st.integers(0, 7)))
            data[place] = flip if kind == "flip" else draw(st.integers(0, 255))
    return bytes(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, packed_tensors):
    folder = tmp_path_factory.mktemp("sharded")
    for name, tensors in SHARDS.items():
        (folder / name).write_bytes(packed_tensors(tensors))
    return folder


def check_header(path, content):
    path.write_bytes(content)
    pread, reached = os.pread, [0]

    def watched(descriptor, num_bytes, offset):
        reached.append(num_bytes + offset)
        return pread(descriptor, num_bytes, offset)

    os.pread = watched
    try:
        header = read_header(path)
    except CheckpointError:
        return
    finally:
        os.pread = pread
        assert max(reached) <= max(8, 8 + int.from_bytes(content[:8], "little"))
        assert max(reached) <= len(content)
    entries = list(header.tensors.values())
    for entry in entries:
        assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= len(content)
    for before, after in pairwise(entries):
        assert before.offset + before.num_bytes <= after.offset
    truth = dict(deserialize(content))
    assert truth.keys() == header.tensors.keys()
    for name, entry in header.tensors.items():
        assert truth[name]["dtype"] == entry.format.name
        assert tuple(truth[name]["shape"]) == entry.shape
        assert truth[name]["data"] == content[entry.offset : entry.offset + entry.num_bytes]


def check_index(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(content)
    try:
        checkpoint = open_checkpoint(str(folder))
    except CheckpointError:
        return
    weight_map = json.loads(content, parse_int=str)["weight_map"]
    assert checkpoint.tensors.keys() == weight_map.keys()
    for name, entry in checkpoint.tensors.items():
        assert entry.file == folder / weight_map[name]
        assert name in SHARDS[entry.file.name]


def valid_header(packed):
    return packed(encode(HEADER), DATA)


def test_the_unmutated_inputs_are_accepted(path, sharded, packed):
    path.write_bytes(valid_header(packed))
    assert len(read_header(path).tensors) == 4
    check_header(path, valid_header(packed))
    (sharded / "model.safetensors.index.json").write_text(encode(INDEX))
    assert set(open_checkpoint(str(sharded)).tensors) == {"a", "b", "c"}


@fuzz(QUICK)
@given(st.data())
def test_header_bytes(path, packed, data):
    check_header(path, data.draw(mutated_bytes(valid_header(packed))))


@fuzz(QUICK)
@given(mutated_trees(HEADER))
def test_header_json(path, packed, node):
    check_header(path, packed(encode(node), DATA))


@fuzz(QUICK)
@given(mutated_trees(INDEX), st.data())
def test_index(sharded, node, data):
    content = encode(node).encode()
    if data.draw(st.booleans()):
        content = data.draw(mutated_bytes(content))
    check_index(sharded, content)


@pytest.mark.slow
@fuzz(SLOW)
@given(st.data())
def test_header_bytes_long(path, packed, data):
    check_header(path, data.draw(mutated_bytes(valid_header(packed))))


@pytest.mark.slow
@fuzz(SLOW)
@given(mutated_trees(HEADER))
def test_header_json_long(path, packed, node):
    check_header(path, packed(encode(node), DATA))


@pytest.mark.slow
@fuzz(SLOW)
@given(mutated_trees(INDEX), st.data())
def test_index_long(sharded, node, data):
    content = encode(node).encode()
    if data.draw(st.booleans()):
        content = data.draw(mutated_bytes(content))
    check_index(sharded, content)
