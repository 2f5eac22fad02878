"""Models with different tokenizers merged into one vocabulary: every token's row against a table
of rows by the token's text, and the output as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from pymerge import api
from pymerge.errors import CheckpointError, PlanError
from pymerge.multi import merge_documents

from .vocabularies import (
    CORPUS,
    EMBEDDING,
    HEAD,
    WIDTH,
    Model,
    added,
    bpe,
    default_row,
    expected_row,
    make_model,
    output_of,
    tokens_of,
    word_piece,
)

WEIGHTS = (0.25, 0.75, 0.5)
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, Model]:
    """A base and two models that share a part of its tokens and have others."""
    root = tmp_path_factory.mktemp("trio")
    return (
        make_model(root / "base", 1, bpe("fruit")),
        make_model(root / "sea", 2, added(bpe("sea"), "<|im_start|>", "<|im_end|>")),
        make_model(root / "code", 3, added(bpe("code"), "<|im_end|>", "<tool>")),
    )


def recipe(models: Sequence[Model], base: Model | None = None, **keys: Any) -> dict[str, Any]:
    entries = [
        {"model": str(model.folder), "parameters": {"weight": weight}}
        for model, weight in zip(models, WEIGHTS, strict=False)
    ]
    found: dict[str, Any] = {"merge_method": "linear", "models": entries, "dtype": "float32"}
    return found | ({"base_model": str(base.folder)} if base else {}) | keys


def merged(tmp_path: Path, text: Mapping[str, Any], **options: Any) -> Path:
    out = tmp_path / "out"
    api.merge(text, out, memory=options.pop("memory", "256MiB"), **options)
    report = api.verify(out)
    assert not report.problems
    return out


def check_rows(
    out: Path, models: Sequence[Model], base: Model | None, but: Sequence[str] = ()
) -> None:
    """Every token of the output has the row that the table gives it."""
    tensors, tokenizer, config = output_of(out)
    for name in (EMBEDDING, HEAD):
        rows = tensors[name]
        assert config["vocab_size"] == len(rows)
        for token, number in tokens_of(tokenizer).items():
            if token not in but:
                expected = expected_row(models, WEIGHTS[: len(models)], base, name, token)
                torch.testing.assert_close(rows[number].double(), expected, **CLOSE)


@pytest.mark.parametrize("threads", [1, 3])
def test_union(trio, tmp_path, threads):
    base, *_ = trio
    out = merged(tmp_path, recipe(trio, base, tokenizer_source="union"), threads=threads)
    _, tokenizer, _ = output_of(out)
    found = tokens_of(tokenizer)
    texts = {token for model in trio for token in model.tokens}
    assert found.keys() == texts
    assert {token: found[token] for token in base.tokens} == base.tokens
    assert sorted(found.values()) == list(range(len(texts)))
    check_rows(out, trio, base)


def test_union_without_a_base_takes_means(trio, tmp_path):
    out = merged(tmp_path, recipe(trio, tokenizer_source="union"))
    check_rows(out, trio, None)
    shared = [t for t in trio[1].tokens if t in trio[2].tokens and t not in trio[0].tokens]
    assert shared


def test_base_and_the_tokenizer_of_a_model(trio, tmp_path):
    base, sea, _ = trio
    out = merged(tmp_path / "a", recipe(trio, base, tokenizer_source="base"))
    assert (out / "tokenizer.json").read_bytes() == (base.folder / "tokenizer.json").read_bytes()
    check_rows(out, trio, base)
    out = merged(tmp_path / "b", recipe(trio, base, tokenizer_source=str(sea.folder)))
    assert (out / "tokenizer.json").read_bytes() == (sea.folder / "tokenizer.json").read_bytes()
    check_rows(out, trio, base)


def test_base_leads_a_task_vector_method(trio, tmp_path):
    """A token that a model lacks has the base's row there, and so no task vector."""
    base, sea, code = trio
    models = [
        {"model": str(m.folder), "parameters": {"weight": w}} for m, w in ((sea, 0.5), (code, 2.0))
    ]
    text = {
        "merge_method": "task_arithmetic",
        "base_model": str(base.folder),
        "models": models,
        "tokenizer_source": "union",
        "dtype": "float32",
    }
    tensors, tokenizer, _ = output_of(merged(tmp_path, text))
    everyone = (sea, code, base)
    for token, number in tokens_of(tokenizer).items():
        default = default_row(everyone, base, EMBEDDING, token)
        own = [m.row(EMBEDDING, token) for m in everyone]
        rows = [default if row is None else row.double() for row in own]
        expected = rows[2] + 0.5 * (rows[0] - rows[2]) + 2.0 * (rows[1] - rows[2])
        torch.testing.assert_close(tensors[EMBEDDING][number].double(), expected, rtol=0, atol=3e-6)


def test_rows_that_the_recipe_names(trio, tmp_path):
    base, sea, code = trio
    number = sea.tokens["</s>"]
    tokens = {
        "<|im_end|>": {"source": str(code.folder), "force": True},
        "<|im_start|>": {
            "source": {"kind": "model_token", "model": str(sea.folder), "token_id": number}
        },
        "<new>": {"source": {"kind": "model_token", "model": str(base.folder), "token": "<s>"}},
        "<zero>": {"source": {"kind": "zero"}},
        "<s>": {"source": {"kind": "zero"}},
        "</s>": {"source": {"kind": "zero"}, "force": True},
    }
    out = merged(tmp_path, recipe(trio, base, tokenizer={"source": "union", "tokens": tokens}))
    tensors, tokenizer, _ = output_of(out)
    check_rows(out, trio, base, but=[*(t for t in tokens if t != "<s>")])
    for name in (EMBEDDING, HEAD):
        rows = {token: tensors[name][tokenizer.token_to_id(token)].double() for token in tokens}
        named = code.row(name, "<|im_end|>").double()
        torch.testing.assert_close(rows["<|im_end|>"], named, **CLOSE)
        # sea keeps its own row, the others take the named one
        own, named = (sea.row(name, t).double() for t in ("<|im_start|>", "</s>"))
        expected = (0.25 * named + 0.75 * own + 0.5 * named) / 1.5
        torch.testing.assert_close(rows["<|im_start|>"], expected, **CLOSE)
        torch.testing.assert_close(rows["<new>"], base.row(name, "<s>").double(), **CLOSE)
        assert not rows["<zero>"].any()
        assert not rows["</s>"].any()


def test_a_token_that_no_model_has_is_zero_and_told(trio, tmp_path):
    base, *_ = trio
    text = recipe(trio, base, tokenizer={"source": "base", "tokens": {"<new>": {}}})
    plan = api.plan(text)
    assert any(
        "no model has a row for 1 of the tokens" in each and "<new>" in each
        for each in plan.warnings
    )
    out = merged(tmp_path, text)
    tensors, tokenizer, _ = output_of(out)
    assert not tensors[EMBEDDING][tokenizer.token_to_id("<new>")].any()
    check_rows(out, trio, base)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"source": "CODE"}, r"tokens\.<x>.*tokenizer does not have the token"),
        (
            {"source": {"kind": "model_token", "model": "SEA", "token": "missing"}},
            r"tokens\.<x>: expected a token of .*sea, found 'missing'",
        ),
        (
            {"source": {"kind": "model_token", "model": "SEA", "token_id": 5000}},
            r"tokens\.<x>: expected an id below the \d+ rows .*, found 5000",
        ),
    ],
)
def test_rows_that_are_not_there(trio, rule, sentence):
    base, sea, code = trio
    text = json.dumps(rule).replace("SEA", str(sea.folder)).replace("CODE", str(code.folder))
    tokenizer = {"source": "base", "tokens": {"<x>": json.loads(text)}}
    with pytest.raises(PlanError, match=sentence):
        api.plan(recipe(trio, base, tokenizer=tokenizer))


def test_transformers_reads_what_was_merged(trio, tmp_path):
    """The ids that the loaded tokenizer gives a text lead to the rows of its tokens."""
    transformers = pytest.importorskip("transformers")
    base, *_ = trio
    out = merged(tmp_path, recipe(trio, base, tokenizer_source="union"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    embedding = model.get_input_embeddings().weight
    _, library, _ = output_of(out)
    assert tokenizer.get_vocab() == tokens_of(library)
    assert len(tokenizer) == len(embedding)
    text = f"{CORPUS['fruit'][0]}<|im_start|>{CORPUS['code'][0]}<|im_end|><tool>"
    ids = tokenizer(text).input_ids
    assert {"<|im_start|>", "<|im_end|>", "<tool>"} <= set(tokenizer.convert_ids_to_tokens(ids))
    for number in ids:
        token = tokenizer.convert_ids_to_tokens(number)
        expected = expected_row(trio, WEIGHTS, base, EMBEDDING, token)
        torch.testing.assert_close(embedding[number].double(), expected, **CLOSE)
    # the flags of added tokens are those of the model that they came from
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith(CORPUS["code"][0])


def test_word_pieces_and_byte_pairs(tmp_path):
    """Tokenizers of different kinds have nothing in common but texts."""
    left = make_model(tmp_path / "left", 1, word_piece("fruit"))
    right = make_model(tmp_path / "right", 2, bpe("sea"))
    out = merged(tmp_path, recipe((left, right), left, tokenizer_source="union"))
    check_rows(out, (left, right), left)


@pytest.mark.parametrize("memory", ["132MiB", "256MiB"])
def test_formats_are_mixed(tmp_path, memory):
    """Rows of a bfloat16 model among float32 ones keep their values; means are rounded once."""
    base = make_model(tmp_path / "base", 1, bpe("fruit"), dtype=torch.bfloat16)
    sea = make_model(tmp_path / "sea", 2, bpe("sea"), dtype=torch.float16)
    code = make_model(tmp_path / "code", 3, bpe("code"))
    models = (base, sea, code)
    out = merged(tmp_path, recipe(models, tokenizer_source="union"), memory=memory)
    check_rows(out, models, None)


def test_a_padded_vocabulary_stays_padded(tmp_path):
    size = bpe("fruit").get_vocab_size()
    left = make_model(tmp_path / "left", 1, bpe("fruit"), rows=size + 30)
    right = make_model(tmp_path / "right", 2, bpe("fruit"), rows=size + 30)
    out = merged(tmp_path, recipe((left, right), left, tokenizer_source="base"))
    tensors, _, config = output_of(out)
    expected = 0.25 * left.tensors[EMBEDDING] + 0.75 * right.tensors[EMBEDDING]
    assert config["vocab_size"] == size + 30
    torch.testing.assert_close(tensors[EMBEDDING], expected, **CLOSE)


def test_padding_of_one_model_and_the_mean_in_another(tmp_path):
    size = bpe("fruit").get_vocab_size()
    left = make_model(tmp_path / "left", 1, bpe("fruit"), rows=size + 7)
    right = make_model(tmp_path / "right", 2, bpe("fruit"))
    tokenizer = {"source": "base", "pad_to_multiple_of": 64}
    out = merged(tmp_path, recipe((left, right), left, tokenizer=tokenizer))
    tensors, _, config = output_of(out)
    rows = -(-(size + 7) // 64) * 64
    assert config["vocab_size"] == rows
    for name in (EMBEDDING, HEAD):
        assert tensors[name].shape == (rows, WIDTH)
        own = left.tensors[name].double()
        mean = right.tensors[name].double().mean(0)
        inside = 0.25 * own[size:] + 0.75 * mean
        torch.testing.assert_close(tensors[name][size : size + 7].double(), inside, **CLOSE)
        beyond = 0.25 * own.mean(0) + 0.75 * mean
        for row in tensors[name][size + 7 :]:
            torch.testing.assert_close(row.double(), beyond, **CLOSE)


def test_tokens_beyond_the_rows_are_not_in_a_model(tmp_path):
    """A tokenizer may name more tokens than its model has rows."""
    size = bpe("fruit").get_vocab_size()
    left = make_model(tmp_path / "left", 1, added(bpe("fruit"), "<a>", "<b>"), rows=size + 1)
    right = make_model(tmp_path / "right", 2, added(bpe("fruit"), "<a>", "<b>"))
    text = recipe((left, right), left, tokenizer_source="base")
    assert any("tokens beyond them count as missing" in each for each in api.plan(text).warnings)
    out = merged(tmp_path, text)
    check_rows(out, (left, right), left)
    tensors, tokenizer, _ = output_of(out)
    number = tokenizer.token_to_id("<b>")
    torch.testing.assert_close(tensors[EMBEDDING][number], right.row(EMBEDDING, "<b>"))


def test_tied_models(tmp_path):
    left = make_model(tmp_path / "left", 1, bpe("fruit"), tied=True)
    right = make_model(tmp_path / "right", 2, bpe("sea"), tied=True)
    out = merged(tmp_path, recipe((left, right), left, tokenizer_source="union"))
    tensors, tokenizer, config = output_of(out)
    assert HEAD not in tensors
    assert config["tie_word_embeddings"]
    for token, number in tokens_of(tokenizer).items():
        expected = expected_row((left, right), WEIGHTS[:2], left, EMBEDDING, token)
        torch.testing.assert_close(tensors[EMBEDDING][number].double(), expected, **CLOSE)


def test_an_untied_model_among_tied_ones(tmp_path):
    left = make_model(tmp_path / "left", 1, bpe("fruit"), tied=True)
    right = make_model(tmp_path / "right", 2, bpe("sea"))
    out = merged(tmp_path, recipe((left, right), left, tokenizer_source="union"))
    tensors, tokenizer, config = output_of(out)
    assert config["tie_word_embeddings"] is False
    heads = (Model(left.folder, {HEAD: left.tensors[EMBEDDING]}, left.tokenizer), right)
    for token, number in tokens_of(tokenizer).items():
        expected = expected_row(heads, WEIGHTS[:2], heads[0], HEAD, token)
        torch.testing.assert_close(tensors[HEAD][number].double(), expected, **CLOSE)


def test_different_sizes_without_a_choice_are_an_error(trio):
    with pytest.raises(PlanError, match=r"tokenizer_source: base or union.*--unsafe-truncate"):
        api.plan(recipe(trio))


def test_cut_to_the_common_rows(tmp_path):
    left = make_model(tmp_path / "left", 1, bpe("fruit"), rows=95)
    right = make_model(tmp_path / "right", 2, bpe("fruit"), rows=91)
    plan = api.plan(recipe((left, right), left), truncate_embeddings=True)
    assert any("cut to the first 91 rows" in each for each in plan.warnings)
    api.merge(plan, tmp_path / "out")
    tensors, _, config = output_of(tmp_path / "out")
    expected = 0.25 * left.tensors[EMBEDDING][:91] + 0.75 * right.tensors[EMBEDDING]
    torch.testing.assert_close(tensors[EMBEDDING], expected, **CLOSE)
    assert config["vocab_size"] == 91


def test_ids_of_special_tokens_follow_the_tokenizer(tmp_path):
    generation = {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 1, "temperature": 0.5}
    left = make_model(
        tmp_path / "left", 1, bpe("fruit"), files={"generation_config.json": generation}
    )
    right = make_model(tmp_path / "right", 2, bpe("sea", ("<unk>", "<pad>", "<s>", "</s>")))
    text = recipe((left, right), left, tokenizer_source=str(right.folder))
    out = merged(tmp_path, text)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 3)
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {**generation, "bos_token_id": 2, "eos_token_id": [3], "pad_token_id": 3}


def test_an_id_whose_token_is_gone_is_told(tmp_path):
    left = make_model(
        tmp_path / "left",
        1,
        added(bpe("fruit"), "<image>"),
        config={"image_token_id": bpe("fruit").get_vocab_size(), "eos_token_id": -1},
    )
    number = left.tokens["<image>"]
    right = make_model(tmp_path / "right", 2, bpe("sea"))
    plan = api.plan(recipe((left, right), left, tokenizer_source=str(right.folder)))
    assert any("no such token as image_token_id" in each for each in plan.warnings)
    assert plan.config["image_token_id"] == number
    assert plan.config["eos_token_id"] == -1


def test_a_model_without_a_tokenizer_has_the_base_s(tmp_path):
    left = make_model(tmp_path / "left", 1, bpe("fruit"))
    right = make_model(tmp_path / "right", 2, bpe("fruit"))
    for path in right.folder.glob("tokenizer*"):
        path.unlink()
    text = recipe((left, right), left, tokenizer_source="union")
    assert any("taken to be that of" in each for each in api.plan(text).warnings)
    check_rows(merged(tmp_path, text), (left, right), left)


def test_an_adapter_on_a_tensor_that_changes_is_refused(tmp_path):
    left = make_model(tmp_path / "left", 1, bpe("fruit"), rows=95)
    right = make_model(tmp_path / "right", 2, added(bpe("fruit"), "<x>"), rows=99)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.lm_head.lora_A.weight": np.ones((1, WIDTH), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((99, 1), np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    text = recipe((left, right), left)
    text["models"][1]["model"] += f"+{adapter}"
    with pytest.raises(PlanError, match=r"lm_head\.weight.*merge the adapter into its base first"):
        api.plan(text | {"tokenizer_source": "union"})
    with pytest.raises(PlanError, match=r"lm_head\.weight.*merge the adapter into its base first"):
        api.plan(text, truncate_embeddings=True)


def test_chat_templates(trio, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, *_ = trio
    text = recipe(trio, base, tokenizer_source="union", chat_template="chatml")
    out = merged(tmp_path, text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()


def test_the_commonest_template(tmp_path):
    texts = {"a": "{{ messages[0]['content'] }} one", "b": "{{ messages[0]['content'] }} two"}
    models = [
        make_model(tmp_path / name, seed, bpe("fruit"), files=files)
        for seed, (name, files) in enumerate(
            {
                "x": {"chat_template.jinja": texts["a"]},
                "y": {"tokenizer_config.json": {"chat_template": texts["b"]}},
                "z": {"chat_template.jinja": texts["b"] + "\n"},
            }.items()
        )
    ]
    out = merged(tmp_path, recipe(models, chat_template="auto"))
    assert (out / "chat_template.jinja").read_text() == texts["b"]


def test_auto_without_any_template_changes_nothing(trio, tmp_path):
    base, *_ = trio
    text = recipe((base,), chat_template="auto")
    assert any("finds a template in no model" in each for each in api.plan(text).warnings)
    assert not (merged(tmp_path, text) / "chat_template.jinja").exists()


def test_a_union_needs_a_tokenizer_that_tokens_can_be_added_to(trio, tmp_path):
    _, sea, _ = trio
    old = make_model(tmp_path / "old", 1, bpe("fruit"))
    words = old.tokenizer.get_vocab()
    (old.folder / "tokenizer.json").unlink()
    (old.folder / "vocab.json").write_text(json.dumps(words))
    (old.folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=r"old: expected a tokenizer\.json"):
        api.plan(recipe((old, sea), old, tokenizer_source="union"))
    plan = api.plan(recipe((old, sea), old, tokenizer_source="base"))
    api.merge(plan, tmp_path / "out")


def test_the_bytes_do_not_depend_on_memory_and_threads(trio, tmp_path):
    base, *_ = trio
    text = recipe(trio, base, tokenizer={"source": "union", "pad_to_multiple_of": 256})
    found = set()
    for number, (memory, threads) in enumerate((("132MiB", 1), ("512MiB", 3))):
        out = tmp_path / str(number)
        api.merge(text, out, memory=memory, threads=threads)
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1
    assert api.plan(text).hash == api.plan(text).hash
    other = recipe(
        trio,
        base,
        tokenizer={
            "source": "union",
            "pad_to_multiple_of": 256,
            "tokens": {"<s>": {"source": {"kind": "zero"}, "force": True}},
        },
    )
    assert api.plan(text).hash != api.plan(other).hash


def test_many_tokens(tmp_path):
    """150,000 tokens in three orders; the table is made with numpy."""
    size, rng = 150_000, np.random.default_rng(0)
    words = [f"w{number}" for number in range(size)]
    models, rows = [], []
    for name in ("a", "b", "c"):
        order = rng.permutation(size + 5_000)[:size]
        folder = tmp_path / name
        folder.mkdir()
        tokens = {words[i] if i < size else f"{name}{i}": n for n, i in enumerate(order)}
        document = {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "w0"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
        values = rng.integers(-8, 8, (size, 4)).astype(np.float32)
        save_file({EMBEDDING: values}, folder / "model.safetensors")
        models.append(folder)
        rows.append({token: values[number] for token, number in tokens.items()})
    entries = [{"model": str(m), "parameters": {"weight": 1}} for m in models]
    text = {
        "merge_method": "linear",
        "base_model": str(models[0]),
        "models": entries,
        "tokenizer_source": "union",
        "dtype": "float32",
    }
    api.merge(text, tmp_path / "out", memory="256MiB")
    tensors, tokenizer, _ = output_of(tmp_path / "out")
    found = tokens_of(tokenizer)
    assert len(found) == len(set().union(*rows))
    for token in rng.choice(sorted(found), 2000):
        has = [table[token] for table in rows if token in table]
        default = rows[0].get(token, np.mean(has, 0))
        own = [table.get(token, default) for table in rows]
        np.testing.assert_allclose(tensors[EMBEDDING][found[token]], np.mean(own, 0), atol=1e-6)


@pytest.mark.parametrize("memory", ["132MiB", "256MiB"])
def test_rows_of_a_merge_that_is_not_written(trio, tmp_path, memory):
    """The rows of one document's output are taken for the next one's vocabulary."""
    base, sea, _ = trio
    twin = make_model(tmp_path / "twin", 7, bpe("fruit"), dtype=torch.bfloat16)
    first = recipe((base, twin), base) | {"name": "inner"}
    second = recipe((sea, base), tokenizer_source="union")
    second["models"][1]["model"] = "inner"
    text = f"{json.dumps(first)}\n---\n{json.dumps(second)}\n"
    report = merge_documents(text, tmp_path / "out", memory=memory)
    assert report.reports["inner"] is None
    rows = {
        name: (0.25 * base.tensors[name] + 0.75 * twin.tensors[name].float())
        for name in (EMBEDDING, HEAD)
    }
    check_rows(tmp_path / "out", (sea, Model(base.folder, rows, base.tokenizer)), None)


def test_rows_of_float8_codes_with_scales(tmp_path):
    base = make_model(tmp_path / "base", 1, bpe("fruit"))
    sea = make_model(tmp_path / "sea", 2, bpe("sea"))
    scales = {name: torch.tensor(0.5 + number) for number, name in enumerate((EMBEDDING, HEAD))}
    codes = {name: sea.tensors[name].to(torch.float8_e4m3fn) for name in scales}
    stored = {
        **sea.tensors,
        **codes,
        **{f"{name}_scale_inv": scale for name, scale in scales.items()},
    }
    save_torch_file(stored, sea.folder / "model.safetensors")
    meant = {name: codes[name].float() * scales[name] for name in scales}
    out = merged(tmp_path, recipe((base, sea), base, tokenizer_source="union"))
    check_rows(out, (base, Model(sea.folder, meant, sea.tokenizer)), base)


def test_long_rows_in_small_blocks(tmp_path):
    """Rows longer than a block, in another order and of another format, and their mean."""
    random, width = np.random.default_rng(0), 600_000
    models, numbers = [], []
    for name, words, dtype in (("a", "xyz", np.float32), ("b", "zyxw", np.float16)):
        folder = tmp_path / name
        folder.mkdir()
        rows = random.normal(size=(len(words), width)).astype(dtype)
        save_file({EMBEDDING: rows}, folder / "model.safetensors")
        vocabulary = {word: number for number, word in enumerate(words)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "x"}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
        (folder / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
        models.append(folder)
        numbers.append({word: rows[n].astype(np.float64) for word, n in vocabulary.items()})
    entries = [{"model": str(each), "parameters": {"weight": 1}} for each in models]
    tokenizer = {"source": str(models[1]), "pad_to_multiple_of": 6}
    text = {"merge_method": "linear", "models": entries, "tokenizer": tokenizer}
    plan = api.plan(text, memory="132MiB", threads=1)
    assert plan.tiling.block_bytes < 4 * width
    api.merge(plan, tmp_path / "out")
    (found,) = load_file(tmp_path / "out" / "model.safetensors").values()
    left = {**numbers[0], "w": numbers[1]["w"]}
    for row, word in zip(found[:4].double(), "zyxw", strict=True):
        expected = torch.from_numpy((left[word] + numbers[1][word]) / 2)
        torch.testing.assert_close(row, expected, **CLOSE)
    mean = sum(left.values()) / 8 + sum(numbers[1].values()) / 8
    for row in found[4:].double():  # half of it was rounded to float16
        torch.testing.assert_close(row, torch.from_numpy(mean), rtol=0, atol=2**-10)
