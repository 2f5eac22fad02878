"""adapter_config.json of the adapters that are written, as PEFT reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pymerge.checkpoint import Checkpoint


def adapter_config(
    *,
    base: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    target_modules: Sequence[str] | str,
    modules_to_save: Sequence[str] = (),
    task_type: str | None,
    revision: str | None = None,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
    lora_bias: bool = False,
    bias: str = "none",
) -> dict[str, Any]:
    """The fields of an adapter whose modules have these ranks and alphas, by their full names;
    without ``alphas`` each is the rank, so that the scale is 1."""
    values: Mapping[str, float] = ranks if alphas is None else alphas
    rank, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(values)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "use_dora": False,
        "target_modules": target_modules,
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": bias,
        "lora_bias": lora_bias,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the modules that have another one.

    PEFT takes the first pattern that matches the name or its end from a dot on, so the name of one
    module may be the pattern of another: then all are listed, the longest first.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    names = sorted(values, key=lambda name: (-len(name), name))
    others = {name: values[name] for name in names if values[name] != common}
    tails = {name: set(_tails(name)) - {name} for name in values}
    if any(tails[name] & others.keys() for name in values):
        others = {name: values[name] for name in names}
    return common, others


def _tails(name: str) -> Iterable[str]:
    """A module's name, and its ends that begin after a dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def target_names(chosen: Collection[str], tensors: Iterable[str]) -> list[str]:
    """What names exactly the chosen modules among those that hold ``tensors``: their last parts
    where no other module has them, else their full names."""
    names: dict[str, set[str]] = {}
    for tensor in tensors:
        # The modules that contain others, too: PEFT would try to adapt them.
        module = tensor.rpartition(".")[0]
        while module:
            names.setdefault(module.rpartition(".")[2], set()).add(module)
            module = module.rpartition(".")[0]
    chosen = set(chosen)
    leaves = {module.rpartition(".")[2] for module in chosen}
    whole = {leaf for leaf in leaves if names.get(leaf, set()) <= chosen}
    rest = {module for module in chosen if module.rpartition(".")[2] not in whole}
    return sorted(whole | rest)


def task_type_of(checkpoint: Checkpoint) -> str | None:
    """PEFT's name for what the model is for, None where the configuration does not tell."""
    architectures = (checkpoint.config or {}).get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return "CAUSAL_LM" if re.search(r"(CausalLM|LMHeadModel)$", str(first)) else None
