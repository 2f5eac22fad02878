"""Models from the Hugging Face hub: from the local cache, else from the network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pymerge.checkpoint.index import INDEX_SUFFIX, read_index
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError
from pymerge.names import nearest

SIDE_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.py")
WEIGHT_PATTERNS = ("*.safetensors",)
PICKLE_PATTERNS = ("*.bin",)
#: The same weights a second time, or for another runtime.
IGNORED_PATTERNS = ("consolidated*", "original/*", "onnx/*", "openvino/*")

_HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


def download(reference: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a hub model in the local cache, downloaded where it is not there yet.

    ``reference`` is ``id`` or ``id@revision`` and no existing path. Raises CheckpointError that
    says why neither a local path nor a hub id worked.
    """
    hub_id, revision = parse_hub_reference(reference)
    patterns = [*SIDE_PATTERNS, *WEIGHT_PATTERNS]
    reasons = []
    for cached_only in (True, False):
        try:
            folder = _snapshot(hub_id, revision, patterns, cached_only)
            if not _has_weights(folder) and allow_pickle:
                folder = _snapshot(hub_id, revision, [*patterns, *PICKLE_PATTERNS], cached_only)
        # The hub client raises many kinds (its own, httpx, OSError); all mean "not to be had", and
        # the reason is passed on.
        except Exception as error:
            reasons.append("not there" if cached_only else brief(error))
            continue
        if _has_weights(folder):
            return folder
        reasons.append("no complete weights in safetensors files under their usual names")
    raise CheckpointError(
        f"model {shown(reference)}: expected an existing path or a model on the hub, found "
        f"neither: no such path in {os.getcwd()}{_similar(reference)}; the hub's cache: "
        f"{reasons[0]}; the hub: {reasons[-1]}. Check the spelling and the current folder, the "
        "network and HF_HUB_OFFLINE; log in with 'hf auth login' for a gated model; give "
        "--allow-pickle for one that has PyTorch files only"
    )


def parse_hub_reference(reference: str) -> tuple[str, str | None]:
    """Hub id and revision. Raises CheckpointError where the text can be no hub id."""
    hub_id, at, revision = reference.partition("@")
    if at and os.path.exists(hub_id):
        raise CheckpointError(
            f"model {shown(reference)}: expected a hub id before '@', found a local path, which "
            f"has no revisions; write {shown(hub_id)}"
        )
    if not _HUB_ID.fullmatch(hub_id) or hub_id.endswith(".safetensors"):
        raise CheckpointError(
            f"model {shown(reference)}: expected an existing path or a hub id such as "
            f"'owner/name', found no such path in {os.getcwd()}{_similar(reference)}, and it "
            "cannot be a hub id; check the spelling and the current folder"
        )
    if at and not revision:
        raise CheckpointError(
            f"model {shown(reference)}: expected a revision after '@', found nothing; write one "
            "or drop the '@'"
        )
    return hub_id, revision or None


def is_hub_id(text: str) -> bool:
    """Whether a text can be the id of a model, with or without its owner."""
    return _HUB_ID.fullmatch(text) is not None


def _snapshot(hub_id: str, revision: str | None, patterns: list[str], cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(IGNORED_PATTERNS),
            local_files_only=cached_only,
        )
    )


def brief(error: Exception) -> str:
    """The first sentence of what the hub's client says."""
    lines = str(error).strip().splitlines()
    sentence = re.split(r"(?<=\w)\.(?:\s|$)", lines[0])[0] if lines else "no reason given"
    return f"{type(error).__name__}, {sentence[:160]}"


def _similar(reference: str) -> str:
    """The nearest name of a folder or file that lies where the reference points."""
    path = Path(reference)
    try:
        match = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""
    return f" (did you mean {shown(str(path.parent / match))}?)" if match else ""


def _has_weights(folder: Path) -> bool:
    """Whether all files of every index, or weights without an index, are there."""
    indices = list(folder.glob(f"*{INDEX_SUFFIX}"))
    if not indices:
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return any(
        all((folder / name).exists() for name in read_index(index).values()) for index in indices
    )
