"""Layer counts of the parts of a model in its config.json: vision tower, encoder, decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pymerge.checkpoint.config import CONFIG_NAME, LAYER_COUNT_KEYS, Config, gather_lists
from pymerge.errors import CheckpointError

#: Part -> the nested config that describes it.
_NESTED = {
    "vision": ("vision_config", "vision_tower_config"),
    "audio": ("audio_config",),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
_NESTED_KEYS = (*LAYER_COUNT_KEYS, "depth", "encoder_layers")
#: Part -> its layer count among the model's own fields.
_OWN_KEYS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}


def set_part_layers(config: Config, part: str, num_before: int, sources: Sequence[int]) -> None:
    """Make ``config`` say that a part has the layers ``sources`` instead of ``num_before``.

    Raises CheckpointError where the config has no such layer count.
    """
    places = list(_places(config, part, num_before))
    both = config.get("is_encoder_decoder", False)
    if not places and part == "decoder" and both and config.get("num_layers") == num_before:
        # T5's decoder has as many layers as the encoder where it is not said.
        config["num_decoder_layers"] = len(sources)
        return
    if not places:
        raise CheckpointError(
            f"{CONFIG_NAME}: expected a layer count of {num_before} for the {part} to set to "
            f"{len(sources)}, found none; a part without one cannot be built from slices"
        )
    if part == "encoder" and both and "num_layers" in config:
        config.setdefault("num_decoder_layers", config["num_layers"])
    for fields, key in places:
        fields[key] = len(sources)
    nested = [fields for fields, _ in places if fields is not config]
    for fields in {id(fields): fields for fields in nested}.values():
        gather_lists(fields, num_before, sources)


def _places(config: Config, part: str, num_before: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the layer count of a part stands."""
    for name in _NESTED.get(part, ()):
        fields = config.get(name)
        if isinstance(fields, dict):
            yield from ((fields, key) for key in _NESTED_KEYS if fields.get(key) == num_before)
    own = _OWN_KEYS.get(part, ())
    if part == "decoder" and not config.get("is_encoder_decoder", False):
        own = (*own, *LAYER_COUNT_KEYS)
    yield from ((config, key) for key in own if config.get(key) == num_before)
