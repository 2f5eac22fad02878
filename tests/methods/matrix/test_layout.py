"""Which tensors are matrices, how tensors are cut into them, and how tiles meet them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import pymerge
from pymerge import api
from pymerge.errors import RecipeError
from pymerge.formats import F32
from pymerge.methods.layout import LAYOUT, Block, blocks_of, unmatched
from pymerge.methods.protocol import Tensor, Tile
from pymerge.ops.opset import choose_ops
from pymerge.ops.view import View

MIB = 1 << 20


def tensor(name: str, shape: tuple[int, ...], *, transposed: bool = False, **given: str) -> Tensor:
    parameters = {spec.name: spec.default for spec in LAYOUT} | given
    ops = choose_ops(())
    return Tensor(name, shape, 1, True, parameters, [{}], ops, transposed=transposed)  # type: ignore


def chosen(name: str, shape: tuple[int, ...] = (6, 4), **given: str) -> bool:
    return bool(blocks_of(tensor(name, shape, **given)))


@st.composite
def windows(draw: Any) -> tuple[Block, int, list[int]]:
    """A window, the elements of its tensor, and where tiles begin."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    first_row, first_column = draw(st.integers(0, rows - 1)), draw(st.integers(0, width - 1))
    stored_rows = draw(st.integers(1, rows - first_row))
    stored_columns = draw(st.integers(1, width - first_column))
    cuts = draw(st.sets(st.integers(1, rows * width)))
    block = Block(first_row, stored_rows, first_column, stored_columns, width)
    return block, rows * width, sorted({0, *cuts} - {rows * width})


@given(windows())
def test_runs_are_the_window_once(case: tuple[Block, int, list[int]]) -> None:
    block, num, starts = case
    elements = np.arange(num, dtype=np.float32)
    code = F32.code
    assert code is not None
    rows = slice(block.first_row, block.first_row + block.stored_rows)
    columns = slice(block.first_column, block.first_column + block.stored_columns)
    window = elements.reshape(-1, block.width)[rows, columns].reshape(-1)
    found = [[] for _ in window]
    for start, end in zip(starts, [*starts[1:], num], strict=True):
        view = View(elements.ctypes.data + 4 * start, code, end - start)
        for part, place in block.runs(Tile(start, end - start, None, (view,))):
            assert part.models[0].num == part.num > 0
            assert part.start == (part.models[0].ptr - elements.ctypes.data) // 4
            for index in range(part.num):
                found[place + index].append(float(part.start + index))
    assert found == [[value] for value in window.tolist()]


@given(windows())
def test_tiles_outside_within_have_no_runs(case: tuple[Block, int, list[int]]) -> None:
    block, num, starts = case
    first, length = block.within
    for start, end in zip(starts, [*starts[1:], num], strict=True):
        if end <= first or start >= first + length:
            view = View(64 + 4 * start, F32.code or 0, end - start)
            assert not list(block.runs(Tile(start, end - start, None, (view,))))


def windows_of(found: tuple[Block, ...], shape: tuple[int, ...]) -> list[np.ndarray]:
    """The matrices [outputs, inputs] of a tensor that counts its elements."""
    stored = np.arange(math.prod(shape)).reshape(-1, shape[-1])
    matrices = []
    for b in found:
        rows, columns = b.first_row + b.stored_rows, b.first_column + b.stored_columns
        part = stored[b.first_row : rows, b.first_column : columns]
        matrix = part.T if b.transposed else part
        assert matrix.shape == (b.rows, b.columns)
        assert b.num_elements == matrix.size
        matrices.append(matrix)
    return matrices


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("split", ["", "proj=3", "proj=6:4:2"])
@pytest.mark.parametrize("experts", [None, 1, 5])
def test_cuts(transposed: bool, split: str, experts: int | None) -> None:
    """As slicing the matrices by hand: experts, then the parts of their outputs."""
    matrix_shape = (7, 12) if transposed else (12, 7)
    shape = matrix_shape if experts is None else (experts, *matrix_shape)
    found = blocks_of(tensor("layers.0.proj.weight", shape, transposed=transposed, split=split))
    ends = {"": [12], "proj=3": [4, 8, 12], "proj=6:4:2": [6, 10, 12]}[split]
    expected = []
    for stored in np.arange(math.prod(shape)).reshape(-1, *matrix_shape):
        matrix = stored.T if transposed else stored
        expected += [matrix[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    for one, other in zip(windows_of(found, shape), expected, strict=True):
        assert (one == other).all()


def test_transpose_names_what_the_config_does_not_tell() -> None:
    given = tensor("layers.0.experts.down_proj", (2, 3, 5), transpose=r"experts\.")
    assert [(b.rows, b.columns) for b in blocks_of(given)] == [(5, 3)] * 2
    assert not any(b.transposed for b in blocks_of(tensor("q_proj", (3, 5), transpose="experts")))


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (4, 0), (0, 3, 3), (8, 3, 3, 3), (1, 1, 1, 1)])
def test_what_has_no_matrix(shape: tuple[int, ...]) -> None:
    assert blocks_of(tensor("layers.0.weight", shape)) == ()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 1, 4)])
def test_thin_ones_are_matrices(shape: tuple[int, ...]) -> None:
    assert len(blocks_of(tensor("layers.0.weight", shape))) == 1


#: Names as the models' files have them; whether each is taken as a matrix.
NAMES = {
    "llama": {
        "model.embed_tokens.weight": False,
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.self_attn.o_proj.weight": True,
        "model.layers.0.mlp.gate_proj.weight": True,
        "model.layers.0.mlp.down_proj.weight": True,
        "lm_head.weight": False,
    },
    "llama by its authors": {
        "tok_embeddings.weight": False,
        "layers.0.attention.wq.weight": True,
        "layers.0.feed_forward.w1.weight": True,
        "output.weight": False,
    },
    "gpt2": {
        "transformer.wte.weight": False,
        "wpe.weight": False,
        "transformer.h.0.attn.c_attn.weight": True,
        "h.0.mlp.c_proj.weight": True,
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": False,
        "gpt_neox.layers.0.attention.query_key_value.weight": True,
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": True,
        "embed_out.weight": False,
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": False,
        "bert.embeddings.token_type_embeddings.weight": False,
        "bert.encoder.layer.0.attention.self.query.weight": True,
        "bert.encoder.layer.0.attention.output.dense.weight": True,
        "bert.encoder.layer.0.output.dense.weight": True,
        "bert.pooler.dense.weight": True,
        "cls.predictions.transform.dense.weight": True,
        "cls.predictions.decoder.weight": False,
        "classifier.weight": True,
    },
    "clip": {
        "text_model.embeddings.token_embedding.weight": False,
        "vision_model.embeddings.position_embedding.weight": False,
        "vision_model.encoder.layers.0.self_attn.k_proj.weight": True,
        "vision_model.encoder.layers.0.mlp.fc1.weight": True,
        "visual_projection.weight": True,
        "text_projection.weight": False,
    },
    "open_clip": {
        "positional_embedding": False,
        "token_embedding.weight": False,
        "text_projection": False,
        "visual.positional_embedding": False,
        "visual.proj": True,
        "visual.transformer.resblocks.0.attn.in_proj_weight": True,
        "visual.transformer.resblocks.0.attn.out_proj.weight": True,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": True,
        "transformer.resblocks.0.mlp.c_proj.weight": True,
    },
    "vit": {
        "vit.embeddings.cls_token": False,
        "vit.embeddings.position_embeddings": False,
        "vit.encoder.layer.0.attention.attention.query.weight": True,
        "vit.encoder.layer.0.intermediate.dense.weight": True,
        "cls_token": False,
        "pos_embed": False,
        "blocks.0.attn.qkv.weight": True,
        "head.weight": True,
        "head.probe": False,
    },
    "swin": {
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table": False,
        "swin.encoder.layers.0.downsample.reduction.weight": True,
    },
    "t5": {
        "shared.weight": False,
        "encoder.embed_tokens.weight": False,
        "encoder.block.0.layer.0.SelfAttention.q.weight": True,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": False,
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": True,
        "lm_head.weight": False,
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.gate.weight": True,
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": True,
        "model.layers.0.mlp.experts.gate_up_proj": True,
        "model.layers.0.mlp.experts.down_proj": True,
        "model.layers.0.mlp.experts.gate_up_proj_bias": False,
        "model.layers.0.mlp.shared_expert.up_proj.weight": True,
        "model.layers.0.mlp.shared_experts.up_proj.weight": True,
    },
    "whisper": {
        "model.encoder.conv1.weight": False,
        "model.encoder.conv2.weight": False,
        "model.encoder.embed_positions.weight": False,
        "model.encoder.layers.0.self_attn.q_proj.weight": True,
        "model.decoder.layers.0.fc1.weight": True,
        "proj_out.weight": False,
    },
    "wav2vec2": {
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight": False,
        "wav2vec2.encoder.pos_conv_embed.conv.weight_v": False,
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": False,
        "wav2vec2.feature_projection.projection.weight": True,
    },
    "mamba": {
        "backbone.embeddings.weight": False,
        "backbone.layers.0.mixer.A_log": False,
        "backbone.layers.0.mixer.conv1d.weight": False,
        "backbone.layers.0.mixer.in_proj.weight": True,
    },
    "lfm2": {
        "model.layers.0.conv.conv.weight": False,
        "model.layers.0.conv.in_proj.weight": True,
    },
}


@pytest.mark.parametrize("model", NAMES)
def test_the_default_choice(model: str) -> None:
    found = {name: chosen(name) for name in NAMES[model]}
    assert found == NAMES[model]


def test_choice_by_the_user() -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    assert chosen(name, layers=r"layers\.[0-3]\.")
    assert not chosen(name, layers=r"layers\.[0-2]\.")
    assert not chosen(name, exclude="mlp")
    assert chosen("lm_head.weight", exclude="")
    assert not chosen("lm_head.weight", layers="head")


@pytest.mark.parametrize("parameter", ["layers", "exclude", "transpose"])
def test_a_bad_expression_is_named(parameter: str) -> None:
    with pytest.raises(RecipeError, match=rf"{parameter}: expected a regular expression.*'\(a'"):
        blocks_of(tensor("weight", (2, 2), **{parameter: "(a"}))


@pytest.mark.parametrize(
    "split", ["proj", "=3", "proj=", "proj=0", "proj=3:x", "proj=-1", "proj=3;"]
)
def test_a_malformed_split_is_shown(split: str) -> None:
    with pytest.raises(RecipeError, match="split: expected names with counts or sizes") as caught:
        blocks_of(tensor("proj.weight", (6, 2), split=split))
    assert repr(split) in str(caught.value)


@pytest.mark.parametrize("split", ["proj=4", "proj=1:2", "proj=7", "proj=3:4"])
def test_a_split_that_does_not_fit_names_the_tensor(split: str) -> None:
    with pytest.raises(RecipeError, match=r"does not fit tensor 'a\.proj' with 6 outputs"):
        blocks_of(tensor("a.proj", (6, 2), split=split))


def test_a_split_is_for_the_tensors_that_it_names() -> None:
    assert len(blocks_of(tensor("a.qkv", (6, 2), split="up=2, qkv=3"))) == 3
    assert len(blocks_of(tensor("a.down", (7, 2), split="up=2, qkv=3"))) == 1


def write(folder: Path, tensors: dict[str, np.ndarray], **config: str) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def drawn(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}


def test_gpt2_by_hand(tmp_path: Path) -> None:
    """Conv1D, fused queries, keys and values, a stack of experts, and what is no matrix: each as
    its matrices merged by themselves."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (50, 24),
        "transformer.h.0.attn.c_attn.weight": (24, 72),
        "transformer.h.0.attn.c_proj.weight": (24, 24),
        "transformer.h.0.ln_1.weight": (24,),
        "transformer.h.0.experts.up": (3, 40, 24),
        "transformer.h.0.conv1d.weight": (24, 1, 4),
        "transformer.h.0.patch.weight": (5, 3, 2, 2),
        "transformer.h.0.scale": (),
        "transformer.h.0.none": (0, 24),
    }
    arrays = [drawn(seed, shapes) for seed in range(3)]
    folders = [write(tmp_path / str(n), a, model_type="gpt2") for n, a in enumerate(arrays)]
    document = {
        "merge_method": "iso_c",
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:]],
        "parameters": {"split": "c_attn=3, experts=10:30", "lambda": 0.7},
        "dtype": "float32",
    }
    api.merge(document, tmp_path / "out", memory=600 * MIB)
    found = load_file(tmp_path / "out" / "model.safetensors")

    def by_hand(name: str, cut: Any) -> np.ndarray:
        base, *models = (np.ascontiguousarray(cut(array[name])) for array in arrays)
        merged = pymerge.merge_tensor("iso_c", base, models, lambda_=0.7)
        assert isinstance(merged, np.ndarray)
        return merged

    attention = "transformer.h.0.attn.c_attn.weight"
    for part in range(3):
        cut = slice(24 * part, 24 * part + 24)
        expected = by_hand(attention, lambda array, cut=cut: array[:, cut].T)
        assert (found[attention][:, cut] == expected.T).all()
    name = "transformer.h.0.attn.c_proj.weight"
    assert (found[name] == by_hand(name, np.transpose).T).all()
    name = "transformer.h.0.experts.up"
    for expert in range(3):
        for cut in (slice(0, 10), slice(10, 40)):
            expected = by_hand(name, lambda array, e=expert, cut=cut: array[e, cut])
            assert (found[name][expert, cut] == expected).all()
    for name in (
        "wte.weight",
        "h.0.ln_1.weight",
        "h.0.conv1d.weight",
        "h.0.patch.weight",
        "h.0.scale",
    ):
        base, *models = (array[f"transformer.{name}"].astype(float) for array in arrays)
        expected = base + 0.7 * sum(model - base for model in models) / 2
        assert np.abs(found[f"transformer.{name}"] - expected).max() < 1e-7, name
    assert found["transformer.h.0.none"].shape == (0, 24)


def test_what_matches_nothing():
    """Patterns are looked for in the tensors that have them; the default need not match."""
    names = ("a.mlp.weight", "a.attn.weight")

    def said(**given: str) -> list[str]:
        return unmatched([tensor(name, (6, 4), **given) for name in names])

    assert not said()
    assert not said(layers="mlp", exclude="attn", split="mlp=2", transpose="a")
    assert "for 'mpl' in its name" in said(exclude="mpl")[0]
    assert "split: no tensor has a match for 'qkv'" in said(split="mlp=2, qkv=3")[0]
    assert [text.split()[0] for text in said(layers="(mpl|atn)")] == ["layers:", "none"]
    assert "none of 2 tensors" in said(exclude=".")[0]
    assert not unmatched([])
