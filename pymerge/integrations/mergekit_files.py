"""The files of a merge that was run for mergekit, under the names that mergekit gives them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

from pymerge.checkpoint import INDEX_NAME, read_header

#: Folders below the output while a merge runs: the engine's output, and what mergekit computed.
STAGING = ".pymerge"
_HOST = ".pymerge-inputs"
SUFFIX = ".safetensors"


def host_folder(out: Path) -> Path:
    """The folder for what mergekit computed; nothing is left there of a run before."""
    folder = out / _HOST
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def place_files(out: Path, stem: str) -> None:
    """Move the weights from the staging folder to ``out`` and write mergekit's index of them."""
    staging = out / STAGING
    index = staging / INDEX_NAME
    paths = sorted(staging.glob(f"model*{SUFFIX}"))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for path in paths:
        name = stem + path.name.removeprefix("model")
        for entry in read_header(path).tensors.values():
            weight_map[entry.name] = name
            total_bytes += entry.num_bytes
        os.replace(path, out / name)
    if index.exists():
        content = {
            "metadata": {
                "total_size": total_bytes,
                "mergekit_version": importlib.metadata.version("mergekit"),
            },
            "weight_map": weight_map,
        }
        (out / f"{stem}{SUFFIX}.index.json").write_text(json.dumps(content, indent=2))
    shutil.rmtree(staging)
