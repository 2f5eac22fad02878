"""plan_shards and index_json against the safetensors library and transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import deserialize, safe_open

from pymerge.checkpoint import OutputTensor, index_json, open_checkpoint, plan_shards, read_header
from pymerge.errors import PlanError
from pymerge.formats import BY_TORCH_NAME, FORMATS


def tensor(name, num_bytes):
    return OutputTensor(name, FORMATS["U8"], (num_bytes,))


def write(shard, folder, data):
    content = bytearray(shard.num_bytes)
    content[: len(shard.header)] = shard.header
    for name, (offset, num_bytes) in shard.tensors.items():
        assert len(data[name]) == num_bytes
        content[offset : offset + num_bytes] = data[name]
    (folder / shard.file_name).write_bytes(content)


def groups(sizes, limit):
    shards = plan_shards([tensor(f"t{i}", size) for i, size in enumerate(sizes)], limit)
    return [[size for _, size in shard.tensors.values()] for shard in shards]


def test_a_shard_closes_when_the_next_tensor_would_exceed_it():
    assert groups([4, 6, 1, 9, 10, 11, 2], 10) == [[4, 6], [1, 9], [10], [11], [2]]
    assert groups([3, 3, 3], 0) == [[3, 3, 3]]
    assert groups([0, 10, 0, 0], 10) == [[0, 10, 0, 0]]
    assert groups([5], 1) == [[5]]


def test_names_offsets_and_alignment():
    (single,) = plan_shards([tensor("a", 5), tensor("b", 3)], 100)
    assert single.file_name == "model.safetensors"
    start = len(single.header)
    assert start % 4096 == 0
    assert single.tensors == {"a": (start, 5), "b": (start + 5, 3)}
    assert (single.num_bytes, single.payload_bytes) == (start + 8, 8)
    shards = plan_shards([tensor(str(i), 5) for i in range(12)], 5)
    assert shards[0].file_name == "model-00001-of-00012.safetensors"
    assert shards[11].file_name == "model-00012-of-00012.safetensors"


def test_index_follows_the_written_order():
    shards = plan_shards([tensor("z", 5), tensor("a", 5), tensor("é", 2)], 6)
    index = json.loads(index_json(shards), object_pairs_hook=list)
    assert [len(shard.tensors) for shard in shards] == [1, 1, 1]
    assert index == [
        ("metadata", [("total_size", 12)]),
        ("weight_map", [(n, s.file_name) for n, s in zip("zaé", shards, strict=True)]),
    ]


def test_the_library_reads_every_format_and_odd_shapes(tmp_path):
    tensors = [OutputTensor(f"t {name}", format, (2, 4)) for name, format in FORMATS.items()]
    tensors += [
        OutputTensor("scalar", FORMATS["F32"], ()),
        OutputTensor("no", FORMATS["F64"], (0, 3)),
    ]
    tensors += [OutputTensor('quote " and é\n', FORMATS["U8"], (3,))]
    (shard,) = plan_shards(tensors, 0)
    data = {
        t.name: bytes((i * 7 + n) % 256 for n in range(t.num_bytes)) for i, t in enumerate(tensors)
    }
    write(shard, tmp_path, data)
    content = (tmp_path / shard.file_name).read_bytes()
    truth = dict(deserialize(content))
    assert {name: bytes(fields["data"]) for name, fields in truth.items()} == data
    with safe_open(tmp_path / shard.file_name, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    header = read_header(tmp_path / shard.file_name)
    for t in tensors:
        entry = header.tensors[t.name]
        assert (entry.format, entry.shape) == (t.format, t.shape)
        assert (entry.offset, entry.num_bytes) == shard.tensors[t.name]


def test_refuses(monkeypatch):
    with pytest.raises(PlanError, match="at least one tensor"):
        plan_shards([], 5)
    with pytest.raises(PlanError, match="'a': expected once"):
        plan_shards([tensor("a", 1), tensor("a", 1)], 5)
    with pytest.raises(PlanError, match="shard size"):
        plan_shards([tensor("a", 1)], -1)
    with pytest.raises(PlanError, match="whole bytes"):
        plan_shards([OutputTensor("a", FORMATS["F4"], (3,))], 5)
    monkeypatch.setattr("pymerge.checkpoint.layout.MAX_HEADER_BYTES", 5000)
    with pytest.raises(PlanError, match="smaller shard size"):
        plan_shards([tensor("x" * 5000, 1)], 0)


@pytest.mark.parametrize("shard_bytes", [0, 4000])
def test_transformers_loads_what_the_layout_describes(tmp_path, shard_bytes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    tensors = [
        OutputTensor(name, BY_TORCH_NAME["bfloat16"], tuple(value.shape))
        for name, value in weights.items()
    ]
    shards = plan_shards(tensors, shard_bytes)
    assert (len(shards) > 1) == (shard_bytes > 0)
    data = {name: value.view(torch.uint16).numpy().tobytes() for name, value in weights.items()}
    for shard in shards:
        write(shard, tmp_path, {name: data[name] for name in shard.tensors})
    if len(shards) > 1:
        (tmp_path / "model.safetensors.index.json").write_bytes(index_json(shards))
    config.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        assert np.array_equal(
            value.view(torch.uint16).numpy(), weights[name].view(torch.uint16).numpy()
        )
    checkpoint = open_checkpoint(str(tmp_path))
    assert list(checkpoint.tensors) == list(weights)
    assert not checkpoint.tied_embeddings
