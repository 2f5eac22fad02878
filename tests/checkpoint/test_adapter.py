"""LoRA adapters: which tensors of a base they change and by what, and what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.checkpoint import (
    AdapterTensor,
    Checkpoint,
    LowRank,
    nominal_format,
    open_checkpoint,
    update_of,
)
from pymerge.errors import CheckpointError

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
EMBED = "model.embed_tokens"
BASE = {
    f"{EMBED}.weight": ("BF16", [12, 6]),
    f"{Q0}.weight": ("BF16", [6, 6]),
    f"{Q0}.bias": ("BF16", [6]),
    f"{Q1}.weight": ("BF16", [6, 6]),
    f"{UP}.weight": ("BF16", [8, 6]),
    "model.norm.weight": ("BF16", [6]),
    "vision.patch.weight": ("BF16", [5, 3, 2, 2]),
    "codes": ("I32", [6, 6]),
    "lm_head.weight": ("BF16", [12, 6]),
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}

Tensors = dict[str, tuple[str, list[int]]]


def factors(
    module: str, num_in: int, num_out: int, rank: int = 2, *, prefix: str = "base_model.model."
) -> Tensors:
    return {
        f"{prefix}{module}.lora_A.weight": ("F32", [rank, num_in]),
        f"{prefix}{module}.lora_B.weight": ("F32", [num_out, rank]),
    }


def embedding(rank: int = 2) -> Tensors:
    return {
        f"base_model.model.{EMBED}.lora_embedding_A": ("F32", [rank, 12]),
        f"base_model.model.{EMBED}.lora_embedding_B": ("F32", [6, rank]),
    }


class Put:
    """Writes a base and adapters, and opens one on the other."""

    def __init__(self, save: Any, packed_tensors: Any) -> None:
        self._save = save
        self._packed = packed_tensors
        self.config: dict[str, Any] = {"num_hidden_layers": 2}

    def base(self, tensors: Tensors | None = None, name: str = "base") -> Path:
        self._save(f"{name}/config.json", self.config)
        chosen = BASE if tensors is None else tensors
        path: Path = self._save(f"{name}/model.safetensors", self._packed(chosen))
        return path.parent

    def adapter(self, tensors: Tensors, name: str = "adapter", **config: Any) -> Path:
        self._save(f"{name}/adapter_config.json", {**CONFIG, **config})
        path: Path = self._save(f"{name}/adapter_model.safetensors", self._packed(tensors))
        return path.parent

    def __call__(self, tensors: Tensors, base: Tensors | None = None, **config: Any) -> Checkpoint:
        return open_checkpoint(f"{self.base(base)}+{self.adapter(tensors, **config)}")


@pytest.fixture
def put(save: Any, packed_tensors: Any) -> Put:
    return Put(save, packed_tensors)


def change(opened: Checkpoint, name: str) -> LowRank:
    found = update_of(opened.tensors[name])
    assert found is not None
    return found


def test_an_update_names_the_matrices_and_leaves_all_else(put: Put) -> None:
    opened = put({**factors(Q0, 6, 6), **factors(UP, 6, 8)})
    base = open_checkpoint(str(put.base()))
    changed = {name for name, entry in opened.tensors.items() if update_of(entry)}
    assert changed == {f"{Q0}.weight", f"{UP}.weight"}
    assert list(opened.tensors) == list(base.tensors)
    for name in base.tensors.keys() - changed:
        assert opened.tensors[name] == base.tensors[name]
    found = change(opened, f"{UP}.weight")
    assert found.left.name.endswith(f"{UP}.lora_B.weight")
    assert found.right is not None
    assert found.right.name.endswith(f"{UP}.lora_A.weight")
    assert (found.rank, found.rows, found.columns, found.transposed) == (2, 8, 6, False)
    assert found.scale == 3.0
    entry = opened.tensors[f"{UP}.weight"]
    assert (entry.file, entry.offset) == (
        base.tensors[entry.name].file,
        base.tensors[entry.name].offset,
    )
    assert [header.path.name for header in opened.headers] == [
        "model.safetensors",
        "adapter_model.safetensors",
    ]
    assert opened.folder == base.folder
    assert opened.config == base.config


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("name", ["", ".default", ".my-adapter"])
def test_names_with_and_without_prefix_and_adapter_name(put: Put, prefix: str, name: str) -> None:
    opened = put(
        {
            f"{prefix}{Q0}.lora_A{name}.weight": ("F32", [2, 6]),
            f"{prefix}{Q0}.lora_B{name}.weight": ("F32", [6, 2]),
            f"{prefix}{Q0}.lora_magnitude_vector{name}{'.weight' if name else ''}": ("F32", [6]),
            f"{prefix}{EMBED}.lora_embedding_A{name}": ("F32", [2, 12]),
            f"{prefix}{EMBED}.lora_embedding_B{name}": ("F32", [6, 2]),
            f"{prefix}{EMBED}.lora_magnitude_vector{name}": ("F32", [6]),
            f"{prefix}lm_head{'.modules_to_save' + name if name else ''}.weight": ("F32", [12, 6]),
        },
        use_dora=True,
    )
    assert change(opened, f"{Q0}.weight").magnitude is not None
    assert change(opened, f"{EMBED}.weight").transposed
    assert opened.tensors["lm_head.weight"].file.name == "adapter_model.safetensors"


def test_the_base_may_have_one_level_of_names_less_or_more(put: Put) -> None:
    less = {name.removeprefix("model."): entry for name, entry in BASE.items()}
    assert change(put(factors(Q0, 6, 6), less), f"{Q0.removeprefix('model.')}.weight")
    more = {f"text.{name}": entry for name, entry in BASE.items()}
    assert change(put(factors(Q0, 6, 6), more), f"text.{Q0}.weight")


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, [3, 3, 3]),
        ({"use_rslora": True}, [6 / math.sqrt(2)] * 3),
        ({"alpha_pattern": {"q_proj": 5}}, [2.5, 2.5, 3]),
        # a pattern meets the whole name, or its end from a dot on
        ({"alpha_pattern": {"proj": 5}}, [3, 3, 3]),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 5}}, [3, 2.5, 3]),
        ({"alpha_pattern": {r"^model\.layers\.\d+\.mlp\.(up|down)_proj": 8}}, [3, 3, 4]),
        # the first pattern that meets counts
        ({"alpha_pattern": {".*_proj": 4, "up_proj": 8}}, [2, 2, 2]),
        ({"lora_alpha": 5.5}, [2.75] * 3),
    ],
)
def test_scales(put: Put, config: dict[str, Any], scales: list[float]) -> None:
    opened = put({**factors(Q0, 6, 6), **factors(Q1, 6, 6), **factors(UP, 6, 8)}, **config)
    found = [change(opened, f"{name}.weight").scale for name in (Q0, Q1, UP)]
    assert found == pytest.approx(scales, rel=1e-15)


def test_ranks_by_pattern(put: Put) -> None:
    pattern = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}
    opened = put({**factors(Q0, 6, 6), **factors(Q1, 6, 6, rank=3)}, **pattern)
    assert change(opened, f"{Q1}.weight").rank == 3
    assert change(opened, f"{Q1}.weight").scale == 2.0
    opened = put({**factors(Q1, 6, 6, rank=3)}, use_rslora=True, **pattern)
    assert change(opened, f"{Q1}.weight").scale == pytest.approx(6 / math.sqrt(3))


def test_embeddings_and_weights_stored_as_in_out_are_transposed(put: Put) -> None:
    assert change(put(embedding()), f"{EMBED}.weight").transposed
    turned = {**BASE, f"{UP}.weight": ("BF16", [6, 8])}
    found = change(put(factors(UP, 6, 8), turned), f"{UP}.weight")
    assert found.transposed
    assert found.left.name.endswith("lora_A.weight")
    assert (found.rows, found.columns) == (6, 8)


def test_square_weights_follow_their_namesakes_then_the_configuration(put: Put) -> None:
    assert not change(put(factors(Q0, 6, 6)), f"{Q0}.weight").transposed
    opened = put(factors(Q0, 6, 6), fan_in_fan_out=True)
    assert change(opened, f"{Q0}.weight").transposed
    base: Tensors = {"a.c_proj.weight": ("F32", [6, 6]), "m.c_proj.weight": ("F32", [9, 6])}
    opened = put({**factors("a.c_proj", 6, 6), **factors("m.c_proj", 9, 6)}, base)
    assert change(opened, "a.c_proj.weight").transposed
    opened = put(
        {**factors("a.c_proj", 6, 6), **factors("m.c_proj", 6, 9)}, base, fan_in_fan_out=True
    )
    assert not change(opened, "a.c_proj.weight").transposed


def test_convolutions_are_matrices_of_what_follows_the_first_extent(put: Put) -> None:
    tensors: Tensors = {
        "vision.patch.lora_A.weight": ("F32", [2, 3, 2, 2]),
        "vision.patch.lora_B.weight": ("F32", [5, 2, 1, 1]),
    }
    found = change(put(tensors), "vision.patch.weight")
    assert (found.rows, found.columns, found.transposed) == (5, 12, False)


def test_whole_tensors_replace_and_keep_the_bases_format_in_name(put: Put) -> None:
    opened = put(
        {
            **factors(Q0, 6, 6),
            f"base_model.model.{Q0}.base_layer.bias": ("F32", [6]),
            "base_model.model.model.norm.weight": ("F32", [6]),
            f"base_model.model.{EMBED}.base_layer.weight": ("F32", [12, 6]),
            **embedding(),
        }
    )
    for name in (f"{Q0}.bias", "model.norm.weight", f"{EMBED}.weight"):
        entry = opened.tensors[name]
        assert isinstance(entry, AdapterTensor)
        assert entry.file.name == "adapter_model.safetensors"
        assert (entry.format.name, nominal_format(entry).name) == ("F32", "BF16")
    assert update_of(opened.tensors["model.norm.weight"]) is None
    assert update_of(opened.tensors[f"{EMBED}.weight"]) is not None


def test_the_bias_of_b_is_added_to_the_modules(put: Put) -> None:
    tensors = {**factors(Q0, 6, 6), f"base_model.model.{Q0}.lora_B.bias": ("F32", [6])}
    found = change(put(tensors), f"{Q0}.bias")
    assert (found.right, found.rows, found.columns, found.scale) == (None, 6, 1, 3.0)


def test_a_head_for_a_base_that_ties_it(put: Put) -> None:
    put.config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    tied = {name: entry for name, entry in BASE.items() if name != "lm_head.weight"}
    opened = put({"base_model.model.lm_head.weight": ("F32", [12, 6])}, tied)
    assert "lm_head.weight" in opened.tensors
    assert not opened.tied_embeddings
    assert opened.config is not None
    assert opened.config["text_config"] == {"tie_word_embeddings": False}
    assert put(embedding(), tied).tied_embeddings


def test_an_adapter_alone_is_put_on_the_base_that_it_names(
    put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put.base()
    folder = put.adapter(factors(Q0, 6, 6), base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    opened = open_checkpoint("adapter")
    assert opened.reference == "adapter"
    assert opened.tensors == open_checkpoint("base+adapter").tensors
    assert not opened.warnings
    put.adapter(factors(Q0, 6, 6), base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path.*base\+adapter"):
        open_checkpoint(str(folder))
    put.adapter(factors(Q0, 6, 6), base_model_name_or_path="./gone")
    with pytest.raises(CheckpointError, match=r"cannot be opened.*\./gone.*base\+adapter"):
        open_checkpoint(str(folder))
    put.adapter(factors(Q0, 6, 6), base_model_name_or_path="adapter")
    with pytest.raises(CheckpointError, match="a whole model under the adapter"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("named", "warned"),
    [("base", False), ("owner/Base", False), ("/else/where/base/", False), ("owner/other", True)],
)
def test_an_explicit_base_wins_and_another_name_is_a_warning(
    put: Put, named: str, warned: bool
) -> None:
    opened = put(factors(Q0, 6, 6), base_model_name_or_path=named)
    assert bool(opened.warnings) is warned
    for sentence in opened.warnings:
        assert named in sentence


def test_a_model_beside_an_adapter_is_the_model(put: Put, save: Any, packed_tensors: Any) -> None:
    folder = put.adapter(factors(Q0, 6, 6))
    save("adapter/model.safetensors", packed_tensors(BASE))
    assert open_checkpoint(str(folder)).tensors.keys() == BASE.keys()


def test_paths_with_plus_signs(put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put.base(name="a+b")
    put.adapter(factors(Q0, 6, 6), name="c+d")
    monkeypatch.chdir(tmp_path)
    assert change(open_checkpoint("a+b+c+d"), f"{Q0}.weight")
    assert change(open_checkpoint("a+b", adapter="c+d"), f"{Q0}.weight")
    with pytest.raises(CheckpointError, match=r"several '\+'"):
        open_checkpoint("a+b+c+e")


def test_pickled_adapters_are_converted_when_allowed(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMERGE_CACHE", str(tmp_path / "cache"))
    base, folder = put.base(), put.adapter(factors(Q0, 6, 6))
    expected = open_checkpoint(f"{base}+{folder}")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors, found none"):
        open_checkpoint(f"{base}+{folder}")
    tensors = {name: torch.zeros(shape) for name, (_, shape) in factors(Q0, 6, 6).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(f"{base}+{folder}")
    opened = open_checkpoint(f"{base}+{folder}", allow_pickle=True)
    assert change(opened, f"{Q0}.weight").scale == change(expected, f"{Q0}.weight").scale
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(CheckpointError, match="weights_only"):
        open_checkpoint(f"{base}+{folder}", allow_pickle=True)


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: entry for name, entry in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (factors("model.layers.7.x", 6, 6), {}, ["layers.7.x.lora_A", "in", "none"]),
        ({"base_model.model.nothing": ("F32", [1])}, {}, ["'base_model.model.nothing'", "none"]),
        (
            {f"base_model.model.{Q0}.lora_E": ("F32", [2, 1])},
            {},
            ["lora_E", "the nearest name", "check that the adapter belongs"],
        ),
        (without(factors(Q0, 6, 6), "lora_B"), {}, ["lora_A", "lora_B beside it, found none"]),
        (without(factors(Q0, 6, 6), "lora_A"), {}, ["lora_B", "lora_A beside it, found none"]),
        (factors(Q0, 6, 5), {}, ["A [2, 6] and B [5, 2]", "[6, 6]"]),
        (factors(Q0, 6, 6, rank=3), {}, ["[2, ...] by the rank", "[3, 6]"]),
        (factors("codes", 6, 6), {}, ["the tensor 'codes.weight'", "none"]),
        (
            {**factors(Q0, 6, 6), f"base_model.model.{Q0}.lora_embedding_A": ("F32", [2, 6])},
            {},
            ["lora_embedding_B beside it"],
        ),
        (
            {**factors(Q0, 6, 6), **factors(Q0, 6, 6, prefix="")},
            {},
            ["one lora_A for a module", "a second one"],
        ),
        (
            {
                f"{Q0}.lora_A.one.weight": ("F32", [2, 6]),
                f"{Q0}.lora_B.two.weight": ("F32", [6, 2]),
            },
            {},
            ["expected one adapter, found one, two"],
        ),
        (factors(Q0, 6, 6), {"use_dora": True}, ["magnitude vector", "use_dora true"]),
        (
            {**factors(Q0, 6, 6), f"{Q0}.lora_magnitude_vector": ("F32", [6])},
            {},
            ["use_dora false and a magnitude vector"],
        ),
        (
            {**factors(Q0, 6, 6), f"{Q0}.lora_magnitude_vector": ("F32", [5])},
            {"use_dora": True},
            ["6 elements", "[5]"],
        ),
        (
            {**factors(Q1, 6, 6), f"{Q1}.lora_B.bias": ("F32", [6])},
            {},
            ["a bias of model.layers.1.self_attn.q_proj"],
        ),
        (
            {**factors(Q0, 6, 6), f"{Q0}.lora_B.bias": ("F32", [5])},
            {},
            ["shape [6]", "found [5]"],
        ),
        (
            {f"base_model.model.{EMBED}.weight": ("F32", [13, 6])},
            {},
            ["shape [12, 6]", "[13, 6]", "resize_token_embeddings"],
        ),
        (
            {f"{Q0}.lora_A.weight": ("I8", [2, 6]), f"{Q0}.lora_B.weight": ("F32", [6, 2])},
            {},
            ["a floating type of 16 bits or more, found I8"],
        ),
        (factors(Q0, 6, 6), {"target_modules": ["k_proj", "proj"]}, ["target_modules names"]),
        (factors(Q0, 6, 6), {"target_modules": r".*\.k_proj"}, ["target_modules names"]),
        (factors(Q0, 6, 6), {"target_modules": "("}, ["field target_modules", "regular"]),
        (factors(Q0, 6, 6), {"target_modules": 5}, ["field target_modules", "found 5"]),
        (factors(Q0, 6, 6), {"alpha_pattern": {"(": 1}}, ["field alpha_pattern", "regular"]),
        (factors(Q0, 6, 6), {"alpha_pattern": {"a": "b"}}, ["alpha_pattern, a", "a number"]),
        (factors(Q0, 6, 6), {"rank_pattern": {"a": 0}}, ["rank_pattern, a", "positive whole"]),
        (factors(Q0, 6, 6), {"r": True}, ["field r", "True"]),
        (factors(Q0, 6, 6), {"lora_alpha": float("inf")}, ["field lora_alpha", "inf"]),
        (factors(Q0, 6, 6), {"use_dora": "yes"}, ["field use_dora", "true or false"]),
        (factors(Q0, 6, 6), {"peft_type": "ADALORA"}, ["peft_type", "'LORA'", "'ADALORA'"]),
        (factors(Q0, 6, 6), {"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "piss"]),
        (factors(Q0, 6, 6), {"layer_replication": [[0, 2]]}, ["layer_replication", "repeated"]),
        (factors(Q0, 6, 6), {"target_parameters": ["a"]}, ["target_parameters", "experts"]),
        (factors(Q0, 6, 6), {"alora_invocation_tokens": [1]}, ["aLoRA", "merge_and_unload"]),
    ],
)
def test_what_does_not_fit_is_refused(
    put: Put, tensors: Tensors, config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        put(tensors, **config)
    message = str(caught.value)
    assert "adapter_model.safetensors" in message or "adapter_config.json" in message
    for word in words:
        assert word in message


def test_a_base_without_floats_is_refused(put: Put) -> None:
    base = {**BASE, f"{UP}.weight": ("I8", [8, 6])}
    with pytest.raises(CheckpointError, match=r"plain weights.*I8.*unquantised base"):
        put(factors(UP, 6, 8), base)


def test_an_update_of_a_tied_head_is_refused(put: Put) -> None:
    put.config = {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match=r"head of its own.*untie the base"):
        put(factors("lm_head", 6, 12))


def test_a_quantised_base_is_named_with_its_adapter(put: Put) -> None:
    put.config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    base = put.base()
    folder = put.adapter(factors(Q0, 6, 6), base_model_name_or_path=str(base))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*bitsandbytes.*base\+adapter"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_broken_configurations(put: Put, save: Callable[..., Path], content: bytes) -> None:
    base, folder = put.base(), put.adapter(factors(Q0, 6, 6))
    save("adapter/adapter_config.json", content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        open_checkpoint(f"{base}+{folder}")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_config\.json, found none"):
        open_checkpoint(f"{base}+{folder}")
    with pytest.raises(CheckpointError, match="name its folder"):
        open_checkpoint(f"{base}+{folder / 'adapter_model.safetensors'}")
