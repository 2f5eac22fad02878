"""Saving and loading the demo's models as Hugging Face style folders, by safetensors alone.

Loading shares no code with the merge engine on purpose: what the engine wrote is read by somebody
else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pymerge.demo.model import Architecture, ResidualMLP
from pymerge.errors import CheckpointError

#: Small enough that these small models have several shards, as large models do.
SHARD_BYTES = 512 * 1024
INDEX = "model.safetensors.index.json"


def save(model: ResidualMLP, folder: Path) -> None:
    """Write ``folder`` with config.json, shards of at most `SHARD_BYTES` and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in model.state_dict().items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.contiguous()
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    sizes = model.architecture
    config = {
        "architectures": ["ResidualMLP"],
        "model_type": "residual_mlp",
        "dtype": "float32",
        "num_pixels": sizes.num_pixels,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "heads": dict(sizes.heads),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> ResidualMLP:
    """Read a folder that `save` or a merge wrote.

    Raises `CheckpointError` where the tensors are not exactly those that config.json calls for.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = Architecture(
        heads=config["heads"],
        num_pixels=config["num_pixels"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
    )
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for file_name in files:
        state.update(load_file(folder / file_name))
    model = ResidualMLP(architecture)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes: {error}. "
            "Delete the folder and run the demo again."
        ) from error
    return model.eval()
