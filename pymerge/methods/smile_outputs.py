"""What smile puts beside a base model, and the file that describes it.

Of the weight NAME of an upscaled layer with N experts: the factors of its experts, the router's
directions, or whole differences (of a bias too); :mod:`pymerge.runtime.smile` puts them to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.methods.layout import blocks_of
from pymerge.methods.protocol import Beside, Description, Extra, Method

DOWN = Extra("smile.down", per_model=True, bits=None)
UP = Extra("smile.up", per_model=True, bits=None)
ROUTER = Extra("smile.router", per_model=True, bits=None)
DENSE = Extra("smile.dense", per_model=True, bits=None)

#: The file that describes the experts, its version, and what an upscaled layer computes.
SMILE_NAME = "smile.json"
SMILE_FORMAT = 1
FORMULA = (
    "y = W x + b + sum over experts i of p_i (up_i down_i x + dense(b)_i), or with dense(W)_i x "
    "in the place of up_i down_i x where k is 0; "
    "p = the top_k largest of softmax over i of |router_i x|, divided by their sum"
)


def _content(
    method: Method, models: Sequence[str], tensors: Sequence[Beside], files: Sequence[str]
) -> dict[str, Any]:
    usual = list(models)
    biases = {each.tensor.name: each.tensor for each in tensors}
    modules, unchanged = {}, []
    for each in tensors:
        tensor = each.tensor
        if ROUTER.suffix not in each.shapes:
            continue
        module, _, _ = tensor.name.rpartition(".")
        if not any(each.values):
            unchanged.append(module)
            continue
        bias = biases.get(f"{module}.bias")
        (block,) = blocks_of(tensor)
        modules[module] = {
            "experts": [usual.index(name) for name in tensor.model_names],
            "biases": [usual.index(name) for name in bias.model_names] if bias else None,
            "k": each.shapes[DOWN.suffix][1] if DOWN.suffix in each.shapes else 0,
            "gate_k": each.shapes[ROUTER.suffix][1],
            "top_k": min(int(tensor.parameters["top_k"]), tensor.num_models),
            "routing_use_diff": tensor.parameters["routing_use_diff"],
            "transposed": block.transposed,
        }
    return {
        "format": SMILE_FORMAT,
        "method": method.spec.name,
        "formula": FORMULA,
        "experts": usual,
        "files": list(files),
        "modules": modules,
        "unchanged": unchanged,
    }


SMILE = Description(
    SMILE_NAME,
    _content,
    "Experts",
    "As it loads, this folder is the base model. Beside it lie the experts of its linear layers: "
    '`pymerge.load_smile("FOLDER")` gives the model with them in Python, where each input goes '
    "through the experts that it is routed to. They are made of these models, by number:",
)
