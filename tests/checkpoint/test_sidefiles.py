"""Which files go along with the weights."""

from __future__ import annotations

import pytest

from pymerge.checkpoint import companion_files, open_checkpoint, skipped_files, tokenizer_files
from pymerge.errors import CheckpointError


@pytest.fixture
def opened(save, packed_tensors):
    """Writes a model with the given other files (name -> content) and opens it."""

    def make(files):
        path = save("m/model.safetensors", packed_tensors({"a": ("U8", [1])}))
        for name, content in files.items():
            save(f"m/{name}", content)
        return open_checkpoint(str(path.parent))

    return make


def names(checkpoint, paths):
    return [path.relative_to(checkpoint.folder).as_posix() for path in paths]


def test_tokenizer_and_companions(opened):
    checkpoint = opened(
        dict.fromkeys(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"], b"{}")
        | dict.fromkeys(["generation_config.json", "preprocessor_config.json"], b"{}")
        | dict.fromkeys(["README.md", "trainer_state.json", "optimizer.pt"], b"{}")
        | {"additional_chat_templates/tool.jinja": b"x", "modeling.py": b""}
    )
    assert names(checkpoint, tokenizer_files(checkpoint)) == [
        "tokenizer_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]
    assert names(checkpoint, companion_files(checkpoint)) == [
        "generation_config.json",
        "preprocessor_config.json",
    ]
    assert names(checkpoint, skipped_files(checkpoint)) == ["modeling.py"]


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_goes_along_when_a_configuration_names_it(opened, where):
    auto_map = {"auto_map": {"AutoModel": "modeling.Model"}}
    checkpoint = opened({where: auto_map, "modeling.py": b"", "layers.py": b""})
    assert names(checkpoint, companion_files(checkpoint)) == ["layers.py", "modeling.py"]
    assert skipped_files(checkpoint) == []


def test_sentence_transformers_modules(opened):
    modules = [
        {"idx": 0, "path": "", "type": "Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "Dense"},
        {"idx": 3, "path": "3_Normalize", "type": "Normalize"},
    ]
    checkpoint = opened(
        {
            "modules.json": modules,
            "sentence_bert_config.json": {},
            "config_sentence_transformers.json": {},
            "1_Pooling/config.json": {},
            "2_Dense/config.json": {},
            "2_Dense/model.safetensors": b"weights",
            "2_Dense/pytorch_model.bin": b"weights again",
            "onnx/config.json": {},
        }
    )
    assert names(checkpoint, companion_files(checkpoint)) == [
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    ]


@pytest.mark.parametrize(
    "modules", [{"path": "x"}, [{"path": "../other"}], [{"path": "/etc"}], [{}], [3], b"{"]
)
def test_malformed_modules(opened, modules):
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        companion_files(opened({"modules.json": modules}))


def test_a_bare_file_has_none(save, packed_tensors):
    save("tokenizer.json", {})
    checkpoint = open_checkpoint(str(save("w.safetensors", packed_tensors({"a": ("U8", [1])}))))
    assert tokenizer_files(checkpoint) == companion_files(checkpoint) == []
    assert skipped_files(checkpoint) == []
