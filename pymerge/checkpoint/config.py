"""The model's config.json: reading it, and writing the one that fits what was merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError
from pymerge.formats import BY_TORCH_NAME

CONFIG_NAME = "config.json"
#: Where models of several parts (vision and text) keep the language model's own fields.
TEXT_KEYS = ("text_config", "llm_config", "language_config")
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DTYPE_KEYS = ("dtype", "torch_dtype")
#: Lists of layer numbers, as opposed to lists with one element for each layer.
LAYER_NUMBER_KEYS = (
    "mlp_only_layers",
    "cross_attention_layers",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
)
QUANTIZATION_KEYS = ("quantization_config", "compression_config")

Config = dict[str, Any]


def read_json(path: Path) -> Any:
    """The value in a JSON file that other programs wrote.

    Reads as transformers does (Infinity is allowed: some configs hold it). Raises FileNotFoundError
    where there is no such file and CheckpointError where it cannot be read as JSON.
    """
    try:
        return json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, found {type(error).__name__}: {error}; "
            "copy or download the file again"
        ) from None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file. Raises CheckpointError."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {shown(value)}; copy or download the file again"
        )
    return value


def layer_count(config: Mapping[str, Any] | None) -> int | None:
    """How many layers the language model has by its config, None where the config does not say.

    Raises CheckpointError where the count is no positive integer.
    """
    if config is None:
        return None
    for part in language_parts(config):
        for key in LAYER_COUNT_KEYS:
            if part.get(key) is None:
                continue
            count = part[key]
            if type(count) is not int or count < 1:
                raise CheckpointError(
                    f"{CONFIG_NAME}, field {key}: expected a positive integer, found "
                    f"{shown(count)}; correct the model's config.json"
                )
            return count
    return None


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """Whether the config says that the output head is the embedding, None where it does not say."""
    for part in language_parts(config or {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def output_config(
    donor_config: Mapping[str, Any],
    *,
    formats: Mapping[str, int],
    num_layers: int | None,
    layer_sources: Sequence[int] | None,
    tied: bool | None,
) -> Config:
    """The donor's config made true for the merged weights; the donor's is left as it is.

    ``formats`` maps torch dtype names to the bytes written in them; the floating one with most
    bytes is named. With ``num_layers`` the layer count is replaced and ``layer_sources`` (the
    donor's layer for each output layer) re-gathers the lists with one element for each layer.
    ``tied`` None leaves the tie flag. Raises CheckpointError where the config cannot express the
    layers.
    """
    try:
        config: Config = copy.deepcopy(dict(donor_config))
    except RecursionError:
        raise CheckpointError(
            f"{CONFIG_NAME}: expected a model's configuration, found objects nested too deeply; "
            "copy or download the file again"
        ) from None
    written = {name: count for name, count in formats.items() if _is_float_name(name)}
    if written:
        _set_dtype(config, max(written, key=lambda name: (written[name], name)))
    if num_layers is not None:
        _set_layers(config, num_layers, layer_sources)
    if tied is not None:
        for part in language_parts(config):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = tied
    for part in language_parts(config):
        for key in QUANTIZATION_KEYS:
            part.pop(key, None)
    return config


def config_json(config: Mapping[str, Any]) -> bytes:
    """The text of a config.json."""
    return (json.dumps(config, indent=2) + "\n").encode()


def language_parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config itself, then the language model's nested configs."""
    yield config
    for key in TEXT_KEYS:
        if isinstance(config.get(key), dict):
            yield config[key]


def _is_float_name(name: str) -> bool:
    format = BY_TORCH_NAME.get(name)
    return format is not None and format.is_float


def _set_dtype(config: Config, name: str) -> None:
    found = False
    for part in language_parts(config):
        for key in DTYPE_KEYS:
            if key in part:
                part[key] = name
                found = True
    if not found:
        # Every transformers version reads this spelling.
        config["torch_dtype"] = name


def _set_layers(config: Config, num_layers: int, layer_sources: Sequence[int] | None) -> None:
    found = False
    for part in language_parts(config):
        count = layer_count({key: part.get(key) for key in LAYER_COUNT_KEYS})
        if count is None:
            continue
        found = True
        for key in LAYER_COUNT_KEYS:
            if part.get(key) == count:
                part[key] = num_layers
        if layer_sources is not None:
            gather_lists(part, count, layer_sources)
    if not found:
        raise CheckpointError(
            f"{CONFIG_NAME}: expected a layer count ({', '.join(LAYER_COUNT_KEYS)}) to set to "
            f"{num_layers}, found none; a model without one cannot be built from slices"
        )


def gather_lists(part: Config, count: int, layer_sources: Sequence[int]) -> None:
    """Make the lists of a config with one element for each of ``count`` layers, or with numbers of
    layers, fit the layers ``layer_sources``. Raises CheckpointError for a layer beyond ``count``.
    """
    for key, value in part.items():
        if not isinstance(value, list):
            continue
        if key in LAYER_NUMBER_KEYS:
            part[key] = [layer for layer, source in enumerate(layer_sources) if source in value]
        elif "layer" in key and len(value) == count:
            for layer, source in enumerate(layer_sources):
                if not 0 <= source < count:
                    raise CheckpointError(
                        f"{CONFIG_NAME}, field {key}: expected an element for layer {source}, the "
                        f"source of output layer {layer}, found {count} elements; name a "
                        "base_model whose config covers these layers"
                    )
            part[key] = [value[source] for source in layer_sources]
