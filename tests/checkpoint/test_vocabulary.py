"""Which token has which id, compared with the tokenizers library; files of tokenizers with more
tokens; and what of a folder does not fit together."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer, WordPieceTrainer

import pymerge
from pymerge.checkpoint.new_tokenizer import extended, union, with_template
from pymerge.checkpoint.tokenizer import read_template, read_tokenizer
from pymerge.checkpoint.vocabulary import (
    disagreements,
    is_vocabulary,
    moved_token_ids,
    set_vocabulary_size,
    vocabulary_rows,
)
from pymerge.errors import CheckpointError

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "a quick dog and a fox", "zażółć"]
KINDS: dict[str, tuple[Any, Any]] = {
    "bpe": (models.BPE, BpeTrainer),
    "wordpiece": (lambda: models.WordPiece(unk_token="[UNK]"), WordPieceTrainer),
    "unigram": (models.Unigram, UnigramTrainer),
    "wordlevel": (lambda: models.WordLevel(unk_token="[UNK]"), WordLevelTrainer),
}


def trained(kind: str, texts: list[str] | None = None) -> Tokenizer:
    model, trainer = KINDS[kind]
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = {"unk_token": "[UNK]"} if kind == "unigram" else {}
    wanted = trainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False, **extra)
    tokenizer.train_from_iterator(TEXTS if texts is None else texts, wanted)
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_ids_are_those_of_the_library(tmp_path, kind):
    tokenizer = trained(kind)
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True), "plain words", "fox"])
    tokenizer.add_special_tokens(["<end>"])
    found = read_tokenizer(saved(tmp_path, tokenizer))
    assert found is not None
    assert found.tokens == tokenizer.get_vocab()
    assert list(found.tokens.values()) == sorted(found.tokens.values())
    assert found.num_ids == max(tokenizer.get_vocab().values()) + 1
    assert found.added.keys() == {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        assert found.texts[number] == token.content
        flags = found.added[token.content]
        assert all(getattr(token, name) == value for name, value in flags.items())


def test_no_tokenizer(tmp_path):
    assert read_tokenizer(tmp_path) is None


def test_tokens_that_only_the_configuration_names(tmp_path):
    decoder = {"77": {"content": "<late>", "special": True}}
    folder = saved(tmp_path, trained("bpe"), tokenizer_config={"added_tokens_decoder": decoder})
    found = read_tokenizer(folder)
    assert found.tokens["<late>"] == 77
    assert found.added["<late>"]["special"]


def test_older_files(tmp_path):
    """vocab.txt and vocab.json with what was added beside them, as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert (
        read_tokenizer(bert).tokens == transformers.BertTokenizer.from_pretrained(bert).get_vocab()
    )
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    (gpt / "vocab.json").write_text(json.dumps(vocabulary))
    (gpt / "added_tokens.json").write_text(json.dumps({"<new>": 4}))
    assert read_tokenizer(gpt).tokens == {**vocabulary, "<new>": 4}


def _field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def test_pieces_of_sentencepiece(tmp_path):
    """The wire format of its model, written here by hand."""
    pieces = ["<unk>", "<s>", "</s>", "▁the", "▁fox", "es"]
    data = b"".join(
        _field(1, _field(1, p.encode()) + b"\x15" + struct.pack("<f", -i) + b"\x18\x01")
        for i, p in enumerate(pieces)
    )
    data += _field(2, b"\x08\x01") + b"\x20\x07"
    (tmp_path / "tokenizer.model").write_bytes(data)
    config = {"tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 6}))
    found = read_tokenizer(tmp_path)
    assert found.tokens == {**{p: i for i, p in enumerate(pieces)}, "<pad>": 6}
    (tmp_path / "tokenizer.model").write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match="expected a SentencePiece model"):
        read_tokenizer(tmp_path)


def test_pieces_that_a_class_numbers_in_its_own_way(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\x0a\x03\x0a\x01a")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*transformers"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "expected a vocabulary"),
        ({"model": {"vocab": {}}}, "expected a vocabulary"),
        ({"model": {"vocab": {"a": -1}}}, "ids that are whole numbers"),
        ({"model": {"vocab": {"a": True}}}, "ids that are whole numbers"),
        ({"model": {"vocab": [3]}}, "tokens that are texts"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "a content and an id"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": 5}, "added_tokens: a list"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, document, sentence):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.json: expected .*{sentence}|{sentence}"
    ):
        read_tokenizer(tmp_path)


def test_tekken_alone_is_told(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found only tekken\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_added_tokens_have_our_ids_in_the_library(tmp_path, kind):
    left = trained(kind)
    left.add_special_tokens(["<left>"])
    right = trained(kind, ["other words entirely", "with a fox"])
    right.add_tokens([AddedToken("<right>", rstrip=True, normalized=False, special=True), "fox"])
    base = read_tokenizer(
        saved(
            tmp_path / "left",
            left,
            tokenizer_config={"added_tokens_decoder": {}},
            added_tokens={"<left>": left.token_to_id("<left>")},
        )
    )
    other = read_tokenizer(saved(tmp_path / "right", right))
    additions, differing = union(base, [(base, None), (other, None)])
    assert differing == ()
    made, files = extended(base, additions)
    library = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert library.get_vocab() == made.tokens
    assert made.tokens.keys() == left.get_vocab().keys() | right.get_vocab().keys()
    assert {t: made.tokens[t] for t in base.tokens} == left.get_vocab()
    token = library.get_added_tokens_decoder()[made.tokens["<right>"]]
    assert (token.rstrip, token.normalized, token.special) == (True, False, True)
    # a word that another model added is now found before texts are split
    assert "fox" in {t.content for t in library.get_added_tokens_decoder().values()}
    for name, field in (("tokenizer_config.json", "added_tokens_decoder"),):
        written = json.loads(files[name])[field]
        assert {e["content"]: int(n) for n, e in written.items()} == {
            text: made.tokens[text] for text in additions
        }
    assert json.loads(files["added_tokens.json"])["<right>"] == made.tokens["<right>"]


def test_the_first_definition_of_a_token_holds(tmp_path):
    tokenizers = []
    for number, special in enumerate((False, True)):
        tokenizer = trained("bpe")
        tokenizer.add_tokens([AddedToken("<x>", special=special, normalized=False)])
        tokenizers.append(read_tokenizer(saved(tmp_path / str(number), tokenizer)))
    third = read_tokenizer(saved(tmp_path / "third", trained("bpe")))
    additions, differing = union(third, [(third, None), *((t, None) for t in tokenizers)])
    assert differing == ("<x>",)
    assert additions["<x>"]["special"] is False


def test_tokens_beyond_the_rows_of_a_model_are_not_taken_over(tmp_path):
    base = read_tokenizer(saved(tmp_path / "a", trained("bpe")))
    tokenizer = trained("bpe")
    tokenizer.add_tokens(["<in>", "<out>"])
    other = read_tokenizer(saved(tmp_path / "b", tokenizer))
    rows = tokenizer.token_to_id("<in>") + 1
    assert list(union(base, [(base, None), (other, rows)])[0]) == ["<in>"]


def test_gaps_in_the_ids_are_refused(tmp_path):
    """The library would give a new token an id that another has."""
    document = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 5}, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    base = read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="without gaps"):
        extended(base, {"<x>": {"special": True}})


def test_templates(tmp_path):
    folder = saved(tmp_path, trained("bpe"), tokenizer_config={"chat_template": "one"})
    assert read_template(folder) == "one"
    several = [{"name": "tool", "template": "t"}, {"name": "default", "template": "two"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert read_template(folder) == "two"
    files = with_template(read_tokenizer(folder), {}, "new")
    assert files["chat_template.jinja"] == b"new"
    assert files["additional_chat_templates/tool.jinja"] == b"t"
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "new"},
        several[0],
    ]
    assert json.loads(files["chat_template.json"]) == {"chat_template": "new"}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    assert read_template(folder) == "new"
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == {"default": "new", "tool": "t"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.embed_tokens.weight", True),
        ("model.language_model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("bert.embeddings.word_embeddings.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("shared.weight", True),
        ("lm_head.weight", True),
        ("lm_head.bias", True),
        ("embed_out.weight", True),
        ("output.weight", True),
        ("cls.predictions.decoder.weight", True),
        ("cls.predictions.bias", True),
        ("backbone.embeddings.weight", True),
        ("bert.embeddings.position_embeddings.weight", False),
        ("bert.embeddings.token_type_embeddings.weight", False),
        ("transformer.wpe.weight", False),
        ("model.layers.0.attention.output.weight", False),
        ("model.layers.0.mlp.shared.weight", False),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("lm_head.dense.weight", False),
    ],
)
def test_names_of_vocabulary_tensors(name, found):
    assert is_vocabulary(name) is found


def test_rows_of_a_vocabulary():
    shapes = {"model.embed_tokens.weight": (9, 2), "lm_head.weight": (8, 2)}
    assert vocabulary_rows(shapes, {"vocab_size": 7}) == 9
    assert vocabulary_rows({"x": (3, 3)}, {"text_config": {"vocab_size": 7}}) == 7
    assert vocabulary_rows({"x": (3, 3)}, None) is None


def test_the_size_goes_where_it_was():
    config = {"vocab_size": 4, "text_config": {"vocab_size": 4, "x": 1}}
    set_vocabulary_size(config, 6)
    assert config == {"vocab_size": 6, "text_config": {"vocab_size": 6, "x": 1}}
    config = {"text_config": {"x": 1}}
    set_vocabulary_size(config, 6)
    assert config == {"text_config": {"x": 1, "vocab_size": 6}}


def test_ids_of_a_configuration_follow_their_tokens(tmp_path):
    left, right = trained("bpe"), trained("bpe", ["quite other words"])
    left.add_special_tokens(["<s>", "<e>", "<img>"])
    right.add_special_tokens(["<q>", "<e>", "<s>", "<stop>"])
    before = read_tokenizer(saved(tmp_path / "a", left))
    after = read_tokenizer(
        saved(tmp_path / "b", right, tokenizer_config={"eos_token": {"content": "<stop>"}})
    )
    old, new = left.token_to_id, right.token_to_id
    config = {
        "bos_token_id": old("<s>"),
        "text_config": {"eos_token_id": [old("<e>"), old("<s>")], "pad_token_id": None},
        "image_token_id": old("<img>"),
        "decoder_start_token_id": -1,
        "hidden_size": old("<s>"),
    }
    moved, lost = moved_token_ids(config, before, after)
    assert moved == {
        **config,
        "bos_token_id": new("<s>"),
        "text_config": {"eos_token_id": [new("<e>"), new("<s>")], "pad_token_id": None},
    }
    assert lost == ("image_token_id",)
    moved, lost = moved_token_ids({"eos_token_id": old("<img>")}, before, after)
    assert (moved, lost) == ({"eos_token_id": new("<stop>")}, ())


def test_disagreements(tmp_path):
    tokenizer = read_tokenizer(saved(tmp_path, trained("bpe")))
    size = tokenizer.num_ids
    shapes = {"model.embed_tokens.weight": (size, 2), "lm_head.weight": (size, 2)}
    assert list(disagreements(shapes, {"vocab_size": size}, tokenizer)) == []
    assert list(disagreements(shapes, None, tokenizer)) == []
    assert len(list(disagreements(shapes, {"vocab_size": size + 1}, tokenizer))) == 2
    shapes["lm_head.weight"] = (size - 1, 2)
    first, second = disagreements(shapes, {"vocab_size": size}, tokenizer)
    assert "expected the" in first
    assert f"{size - 1} (" in second
    llama = {"model_type": "mllama", "text_config": {"vocab_size": size}}
    shapes = {
        "language_model.model.embed_tokens.weight": (size + 8, 2),
        "lm_head.weight": (size, 2),
    }
    assert list(disagreements(shapes, llama, None)) == []


def test_verify_compares_the_folder_with_itself(tmp_path):
    tokenizer = trained("bpe")
    size = tokenizer.get_vocab_size()
    folder = saved(tmp_path / "model", tokenizer, config={"vocab_size": size})
    rows = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
    save_file({"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    pymerge.merge(recipe, tmp_path / "whole")
    assert pymerge.verify(tmp_path / "whole").ok
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": size + 1}))
    pymerge.merge(recipe, tmp_path / "wrong")
    problems = pymerge.verify(tmp_path / "wrong").problems
    assert len(problems) == 2
    assert "vocab_size" in problems[0]
    assert "'<beyond>'" in problems[1]
