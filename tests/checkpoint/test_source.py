"""open_checkpoint on folders and files as users have them, good and broken."""

from __future__ import annotations

import os

import pytest

from pymerge.checkpoint import layer_count, open_checkpoint
from pymerge.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def shard(number, total=3):
    return f"model-{number:05d}-of-{total:05d}.safetensors"


@pytest.fixture
def model(save, packed_tensors):
    """A folder of three shards with an index whose names are not in shard order."""
    files = {
        shard(1): {"e": ("BF16", [4, 2]), "l.0": ("F32", [3])},
        shard(2): {"l.10": ("F32", [3]), "l.9": ("F32", [2])},
        shard(3): {"a": ("F32", [1])},
    }
    for name, tensors in files.items():
        save(f"model/{name}", packed_tensors(tensors))
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    save(f"model/{INDEX}", {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    return save("model/config.json", {"num_hidden_layers": 2}).parent


def refused(reference, *words, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(reference), **options)
    for word in words:
        assert word in str(caught.value)


def test_opens_by_index(model):
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.reference == str(model)
    assert checkpoint.folder == model
    assert checkpoint.hub_id is None
    assert checkpoint.config == {"num_hidden_layers": 2}
    assert layer_count(checkpoint.config) == 2
    assert list(checkpoint.tensors) == ["e", "l.0", "l.10", "l.9", "a"]
    assert [header.path.name for header in checkpoint.headers] == [shard(1), shard(2), shard(3)]
    assert checkpoint.total_bytes == 16 + 12 + 12 + 8 + 4


def test_shards_are_ordered_by_number_not_by_text(save, packed_tensors):
    names = [f"part-{i}.safetensors" for i in (2, 10, 1)]
    for name in names:
        path = save(f"m/{name}", packed_tensors({name: ("U8", [1])}))
    assert list(open_checkpoint(str(path.parent)).tensors) == [
        f"part-{i}.safetensors" for i in (1, 2, 10)
    ]


def test_opens_an_index_file_a_single_file_and_a_folder_without_index(model, save, packed_tensors):
    expected = open_checkpoint(str(model)).tensors
    assert open_checkpoint(str(model / INDEX)).tensors == expected
    (model / INDEX).unlink()
    assert open_checkpoint(str(model)).tensors == expected
    single = open_checkpoint(str(model / shard(2)))
    assert list(single.tensors) == ["l.10", "l.9"]
    assert single.folder is None
    assert single.config is None


def test_an_existing_path_wins_over_the_hub_and_may_hold_odd_characters(
    save, packed_tensors, monkeypatch, tmp_path
):
    save("owner/name+x@1/model.safetensors", packed_tensors({"a": ("U8", [1])}))
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("owner/name+x@1")
    assert checkpoint.reference == "owner/name+x@1"
    assert checkpoint.hub_id is None


def test_links_may_leave_the_folder(model, tmp_path):
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        blob = tmp_path / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, model))
    assert len(open_checkpoint(str(model)).tensors) == 5


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, ["weight_map", "not empty"]),
        ([], ["weight_map"]),
        ({"a": 1}, ["'a'", "name of a file"]),
        ({"": "x.safetensors"}, ["name"]),
        ({"a": "../x.safetensors"}, ["'../x.safetensors'"]),
        ({"a": "/etc/passwd"}, ["'/etc/passwd'"]),
        ({"a": "x/../../y.safetensors"}, ["name of a file"]),
        ({"a": "./model.safetensors"}, ["name of a file"]),
        ({"a": "C:\\x.safetensors"}, ["name of a file"]),
        ({"a": "x\0.safetensors"}, ["name of a file"]),
        ({"a": "none.safetensors"}, ["none.safetensors", "found none"]),
        ({"a": "x" * 5000}, ["found none"]),
    ],
)
def test_refuses_a_bad_weight_map(model, save, weight_map, words):
    save(f"model/{INDEX}", {"weight_map": weight_map})
    refused(model, INDEX, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ["JSON"]),
        (b"[]", ["an object"]),
        (b'{"weight_map":{"a":"b","a":"b"}}', ["'a' twice"]),
        (b'{"weight_map":' + b"[" * 100_000, ["nested too deeply"]),
        (b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_refuses_a_bad_index(model, save, content, words):
    save(f"model/{INDEX}", content)
    refused(model, INDEX, *words)


def test_index_and_files_must_agree(model, save, packed_tensors):
    save(f"model/{shard(3)}", packed_tensors({"b": ("F32", [1])}))
    refused(model, "'a'", shard(3), "none there")
    save(f"model/{shard(3)}", packed_tensors({"a": ("F32", [1]), "extra": ("U8", [1])}))
    refused(model, "'extra'", shard(3), "not listed")
    save(f"model/{shard(3)}", packed_tensors({"a": ("F32", [1]), "e": ("U8", [1])}))
    refused(model, "'e'", shard(3))


def test_a_single_file_beside_a_foreign_index_is_ambiguous(model, save, packed_tensors):
    save("model/model.safetensors", packed_tensors({"a": ("F32", [1])}))
    refused(model, "found both", "left over")
    assert len(open_checkpoint(str(model / INDEX).replace(INDEX, shard(1))).tensors) == 2


def test_a_tensor_in_two_files(save, packed_tensors):
    for name in ("x", "y"):
        path = save(f"m/{name}.safetensors", packed_tensors({"a": ("U8", [1])}))
    refused(path.parent, "'a' once", "x.safetensors", "y.safetensors")


def test_missing_and_mixed_shards(model, save, packed_tensors):
    (model / INDEX).unlink()
    (model / shard(2)).unlink()
    refused(model, "expected 3 shards", "found 2")
    save(f"model/{shard(1, 2)}", packed_tensors({"z": ("U8", [1])}))
    refused(model, "left over")


def test_second_copies_and_adapters_are_left_out(save, packed_tensors):
    save("m/adapter_model.safetensors", packed_tensors({"lora": ("U8", [1])}))
    save("m/consolidated.safetensors", packed_tensors({"a": ("U8", [1])}))
    path = save("m/model.safetensors", packed_tensors({"b": ("U8", [1])}))
    assert list(open_checkpoint(str(path.parent)).tensors) == ["b"]
    path.unlink()
    assert list(open_checkpoint(str(path.parent)).tensors) == ["a"]


def test_folders_without_weights(save, tmp_path):
    refused(save("empty/readme", b"").parent, "found no weights")
    refused(save("lora/adapter_config.json", {}).parent, "peft_type", "merge_and_unload")
    refused(save("gguf/m.gguf", b"").parent, "GGUF")
    refused(save("half/model.safetensors.partial", b"").parent, "unfinished")
    refused(save("outer/0_Transformer/model.safetensors", b"").parent.parent, "'0_Transformer'")
    refused(save("m.gguf", b""), "GGUF")
    refused(save("m.npz", b""), "another kind")


def test_no_tensors_at_all(save, packed):
    refused(save("m/model.safetensors", packed("{}")).parent, "found none", "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"3"])
def test_malformed_config(model, save, content):
    save("model/config.json", content)
    refused(model, "config.json", "expected")


def test_config_may_be_missing_or_hold_infinity(model, save):
    save("model/config.json", b'{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(str(model)).config == {"time_step_limit": [0.0, float("inf")]}
    (model / "config.json").unlink()
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.config is None
    assert not checkpoint.tied_embeddings


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
)
def test_refuses_quantised_configs(model, save, config):
    save("model/config.json", config)
    refused(model, "quantis", "unquantised model")
    save("model/config.json", {"quantization_config": None})
    open_checkpoint(str(model))


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.qweight": ("I32", [2]), "l.scales": ("F16", [1])},
        {"l.weight": ("U8", [2]), "l.weight.absmax": ("F32", [1])},
        {"l.weight": ("I8", [2]), "l.SCB": ("F32", [1])},
    ],
)
def test_refuses_quantised_tensors_without_config(save, packed_tensors, tensors):
    refused(save("m.safetensors", packed_tensors(tensors)), "'l.", "unquantised")


def test_plain_float8_and_integers_are_no_quantisation(save, packed_tensors):
    tensors = {"l.weight": ("F8_E4M3", [2]), "l.bias_scale": ("F32", [1]), "ids": ("I64", [3])}
    assert len(open_checkpoint(str(save("m.safetensors", packed_tensors(tensors)))).tensors) == 3


@pytest.mark.parametrize(
    ("config", "has_head", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"architectures": ["GPT2LMHeadModel"]}, False, True),
        ({"architectures": ["LlamaForCausalLM"]}, True, False),
        ({"architectures": ["BertModel"]}, False, False),
        ({"architectures": 5}, False, False),
        ({"architectures": None}, False, False),
        ({"architectures": "LlamaForCausalLM"}, False, True),
        ({}, False, False),
    ],
)
def test_tied_embeddings(save, packed_tensors, config, has_head, tied):
    tensors = {"model.embed_tokens.weight": ("F32", [2])}
    if has_head:
        tensors["lm_head.weight"] = ("F32", [2])
    save("m/config.json", config)
    folder = save("m/model.safetensors", packed_tensors(tensors)).parent
    assert open_checkpoint(str(folder)).tied_embeddings is tied
