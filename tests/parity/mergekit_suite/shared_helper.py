"""What mergekit's tests import as ``tests.common``, which its source distribution leaves out.

Tiny models with random weights, and a merge of them whose output is looked at: it has weights and a
configuration, every tensor that its architecture requires, and no NaN. ``run_merge`` is looked up
when it is called, so that these merges are those of whatever stands in its place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from mergekit import architecture, merge
from mergekit.config import MergeConfiguration
from safetensors import safe_open

#: The language model of most tests; heads are smaller than anything real.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a temporary folder, check the output, then let ``validate`` see the folder."""
    with tempfile.TemporaryDirectory() as place:
        merge.run_merge(config, out_path=place, options=merge.MergeOptions())
        folder = Path(place)
        index_name = index_json_name or "model.safetensors.index.json"
        weights = [folder / index_name, folder / index_name.removesuffix(".index.json")]
        assert any(path.exists() for path in weights), f"no weights in {sorted(folder.iterdir())}"
        assert (folder / "config.json").exists(), "no config.json"
        names = _check_files(folder, check_nan)
        if check_tensors:
            _check_names(config, folder, names, auto_arch)
        if validate is not None:
            validate(place)


def _check_files(folder: Path, check_nan: bool) -> set[str]:
    """The names of all tensors in the folder."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                names.add(name)
                if check_nan:
                    assert not file.get_tensor(name).isnan().any(), f"{name} has NaN"
    return names


def _check_names(
    config: MergeConfiguration, folder: Path, names: set[str], by_recipe: bool
) -> None:
    """Every tensor that the output's architecture requires is there, by one of its names.

    Of models that mergekit has no list of names for, it takes those of the module in memory, which
    need not be those that a checkpoint has; then transformers must find everything in the output.
    """
    written = transformers.AutoConfig.from_pretrained(folder)
    if by_recipe:
        info = architecture.get_architecture_info(config, merge.MergeOptions())
    else:
        info = architecture.arch_info_for_config(written)
    missing = [
        weight.name
        for weight in info.all_weights(written)
        if not weight.optional and names.isdisjoint([weight.name, *(weight.aliases or ())])
    ]
    if missing and by_recipe:
        _, found = getattr(transformers, written.architectures[0]).from_pretrained(
            folder, output_loading_info=True
        )
        missing = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    assert not missing, f"tensors are missing: {missing}"


def _saved(model: Any, path: Any) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(vocab_size=vocab_size, num_attention_heads=16, **SMALL)
    return _saved(transformers.LlamaForCausalLM(config), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    config = transformers.GraniteConfig(
        vocab_size=vocab_size, num_attention_heads=2, num_key_value_heads=2, **SMALL
    )
    return _saved(transformers.GraniteForCausalLM(config), path)


def make_gpt2size(path: Any) -> str:
    return _saved(transformers.GPT2LMHeadModel(transformers.GPT2Config()), path)


def make_picoLlaVa(path: Any) -> str:  # the name that mergekit's tests import
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        ),
        text_config=transformers.LlamaConfig(vocab_size=64, num_attention_heads=16, **SMALL),
        image_seq_length=16,
    )
    return _saved(transformers.LlavaForConditionalGeneration(config), path)
