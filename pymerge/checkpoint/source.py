"""Opening a checkpoint: from what the user wrote to checked headers. No tensor data is read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pymerge.checkpoint import hub, pickle
from pymerge.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from pymerge.checkpoint.config import CONFIG_NAME, read_json_object, tie_flag
from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.index import INDEX_NAME, INDEX_SUFFIX, check_agreement, read_index
from pymerge.checkpoint.layout import STATISTICS_FOLDER, STATISTICS_NAME, TASKS_FILE
from pymerge.checkpoint.quantization import refuse_quantized_config, refuse_quantized_tensors
from pymerge.checkpoint.scaled import with_scales
from pymerge.checkpoint.strict_json import shown, shown_names
from pymerge.errors import CheckpointError
from pymerge.names import split_adapter

SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
#: Files beside the weights that a trainer left and that hold no weights of the model.
_TRAINER_FILES = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|adapter_model|random_states)[\w.-]*"
)
_SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
_HEADS = ("lm_head.weight", "embed_out.weight")


def is_head(name: str) -> bool:
    """Whether a tensor is the output head, which a model may tie to its embedding."""
    return name == "output.weight" or name.endswith(_HEADS)


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers were read and found consistent.

    ``folder`` holds config and tokenizer files and is None for a bare weights file. ``hub_id`` is
    set where the model came from the hub. ``tensors`` is ordered by shard, then offset; with a LoRA
    adapter those that it changes say how (``adapter.AdapterTensor``), and float8 codes with scales
    are the weights that they mean (``scaled.ScaledTensor``). ``warnings`` are sentences.
    """

    reference: str
    folder: Path | None
    headers: tuple[Header, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any] | None
    hub_id: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.read_bytes for entry in self.tensors.values())

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embedding.

        By the config's flag; without one, a causal language model without a head tensor is tied.
        """
        flag = tie_flag(self.config)
        if flag is not None:
            return flag
        architectures = (self.config or {}).get("architectures")
        names = architectures if isinstance(architectures, list) else [architectures]
        is_causal = any("CausalLM" in str(name) or "LMHead" in str(name) for name in names)
        return is_causal and not any(map(is_head, self.tensors))


def open_checkpoint(
    reference: str, *, adapter: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a folder, a weights file, an index file or a hub model (``id`` or ``id@revision``).

    An existing local path wins over the hub. ``base+adapter``, or ``adapter`` beside the base, puts
    a LoRA adapter on the model; the folder of an adapter alone is one on the base that it names.
    With ``allow_pickle`` PyTorch files are converted into the user's cache; without it they are
    refused. Raises CheckpointError.
    """
    from pymerge.checkpoint.adapter import apply_adapter, base_of, open_adapter

    if adapter is None:
        try:
            reference, adapter = split_adapter(reference)
        except ValueError as error:
            raise CheckpointError(f"model {shown(reference)}: {error}") from None
    if adapter is not None:
        base = _open_base(reference, allow_pickle)
        return apply_adapter(base, open_adapter(adapter, allow_pickle=allow_pickle))
    opened = _open(reference, allow_pickle)
    if isinstance(opened, Checkpoint):
        return opened
    alone = open_adapter(reference, allow_pickle=allow_pickle)
    name = base_of(alone)
    try:
        base = _open_base(name, allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(
            f"{alone.config.path}, field base_model_name_or_path: the base of the adapter cannot "
            f"be opened: {error}. Write the model as base+adapter to name another place"
        ) from error
    return replace(apply_adapter(base, alone), reference=reference)


def with_adapter(
    base: Checkpoint, adapter: str | None, *, allow_pickle: bool = False
) -> Checkpoint:
    """A model that is open with an adapter put on it, if there is one. Raises CheckpointError."""
    from pymerge.checkpoint.adapter import apply_adapter, open_adapter

    if adapter is None:
        return base
    return apply_adapter(base, open_adapter(adapter, allow_pickle=allow_pickle))


def _open_base(reference: str, allow_pickle: bool) -> Checkpoint:
    """A model to put an adapter on."""
    opened = _open(reference, allow_pickle)
    if isinstance(opened, Checkpoint):
        return opened
    raise CheckpointError(
        f"model {shown(reference)}: expected a whole model under the adapter, found the adapter "
        f"{opened}; merge that one into its base first"
    )


def _open(reference: str, allow_pickle: bool) -> Checkpoint | Path:
    """The model, or the folder where it is an adapter."""
    path = Path(reference)
    # pathlib takes an empty text for the current folder.
    status = _status(path) if reference else None
    hub_id = None
    if status is None:
        path = hub.download(reference, allow_pickle=allow_pickle)
        hub_id = reference
    elif not stat.S_ISDIR(status.st_mode):
        return _open_file(reference, path, allow_pickle)
    index = _find_index(path)
    if index is None and (path / ADAPTER_CONFIG_NAME).exists() and not _holds_model(path):
        return path
    return _open_folder(reference, path, index, hub_id, allow_pickle)


def _holds_model(folder: Path) -> bool:
    """Whether a folder with an adapter holds a whole model beside it."""
    return any((folder / name).exists() for name in (SINGLE_FILE, "pytorch_model.bin")) or any(
        _SHARD_NUMBER.search(path.name) for path in folder.glob("model*")
    )


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _open_file(reference: str, path: Path, allow_pickle: bool) -> Checkpoint:
    if path.name.endswith(INDEX_SUFFIX):
        return _open_folder(reference, path.parent, path, None, allow_pickle)
    if path.suffix == ".safetensors":
        header = read_header(path)
    elif path.suffix in (*PICKLE_SUFFIXES, ".ckpt"):
        header = _convert(reference, [path], None, allow_pickle)[0]
    else:
        raise CheckpointError(
            f"model {shown(reference)}: expected a folder, a .safetensors file or an index "
            f"({INDEX_NAME}), found a file of another kind; {_conversion_advice(path.suffix)}"
        )
    return _build(reference, None, (header,), None, None)


def _conversion_advice(suffix: str) -> str:
    if suffix == ".gguf":
        return "GGUF weights are quantised and cannot be merged: name the safetensors original"
    return "name one of these"


def _find_index(folder: Path) -> Path | None:
    """The index to go by; None where the folder has none."""
    if (folder / INDEX_NAME).exists():
        return folder / INDEX_NAME
    others = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    others = [path for path in others if not path.name.startswith("consolidated")] or others
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: expected one index, found {shown_names([path.name for path in others])}; "
            "name the index file to use instead of the folder"
        )
    return others[0] if others else None


def _open_folder(
    reference: str, folder: Path, index: Path | None, hub_id: str | None, allow_pickle: bool
) -> Checkpoint:
    if folder.absolute().name == STATISTICS_FOLDER and (folder / STATISTICS_NAME).is_file():
        raise CheckpointError(
            f"model {shown(reference)}: expected a model, found statistics of one; name the folder "
            "above it"
        )
    config = read_json_object(folder / CONFIG_NAME)
    refuse_quantized_config(reference, config)
    if index is not None:
        headers = _open_indexed(reference, index, config, allow_pickle)
    else:
        files = _safetensors_files(folder)
        if files:
            _check_shard_numbers(folder, files)
            headers = tuple(read_header(path) for path in files)
        else:
            headers = _open_pickles(reference, folder, config, allow_pickle)
    return _build(reference, folder, headers, config, hub_id)


def _open_indexed(
    reference: str, index: Path, config: dict[str, Any] | None, allow_pickle: bool
) -> tuple[Header, ...]:
    weight_map = read_index(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()), key=_natural_order)]
    has_pickles = any(path.suffix in PICKLE_SUFFIXES for path in files)
    if has_pickles and not allow_pickle:
        raise _pickles_refused(reference, files)
    for path in files:
        if _status(path) is None:
            raise CheckpointError(
                f"{index}: expected the file {shown(path.name)} beside it, found none; "
                "copy or download the checkpoint again"
            )
    single = index.parent / SINGLE_FILE
    if index.name == INDEX_NAME and single not in files and single.exists():
        raise CheckpointError(
            f"{index.parent}: expected {SINGLE_FILE} or {INDEX_NAME}, found both, and the index "
            "does not list that file: one of them is left over from an older save. Remove it, or "
            "name the file to use"
        )
    if has_pickles:
        headers = _convert(reference, files, config, allow_pickle)
        lost = weight_map.keys() - {name for header in headers for name in _names(header)}
        if lost:
            raise CheckpointError(
                f"{index}: expected tensor {shown_names(sorted(lost))} in the files, found none; "
                "copy or download the checkpoint again"
            )
        return headers
    headers = tuple(read_header(path) for path in files)
    check_agreement(index, weight_map, headers)
    return headers


def _names(header: Header) -> Iterable[str]:
    """Names in a converted file, with the tied ones that were left out."""
    return header.tensors.keys() | header.metadata.keys()


def _safetensors_files(folder: Path) -> list[Path]:
    """The weights of a folder without an index, in shard order."""
    names = [path.name for path in folder.glob("*.safetensors")]
    names = [name for name in names if not name.startswith("adapter_model")]
    names = [name for name in names if not TASKS_FILE.fullmatch(name)]
    if SINGLE_FILE in names:
        return [folder / SINGLE_FILE]
    # Some models ship the same weights a second time under their makers' own names.
    names = [name for name in names if not name.startswith("consolidated")] or names
    return [folder / name for name in sorted(names, key=_natural_order)]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by value: shard 2 before shard 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def _check_shard_numbers(folder: Path, files: list[Path]) -> None:
    numbered = [(path, _SHARD_NUMBER.search(path.name)) for path in files]
    found = {int(match[1]) for _, match in numbered if match}
    totals = {int(match[2]) for _, match in numbered if match}
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: expected the shards of one save, found shards of {sorted(totals)} files; "
            "remove those left over from an older save"
        )
    if totals and len(found) < max(totals):
        raise CheckpointError(
            f"{folder}: expected {max(totals)} shards by their names, found {len(found)}; "
            "copy or download the missing files"
        )


def _open_pickles(
    reference: str, folder: Path, config: dict[str, Any] | None, allow_pickle: bool
) -> tuple[Header, ...]:
    index = folder / f"pytorch_model.bin{INDEX_SUFFIX}"
    if index.exists():
        return _open_indexed(reference, index, config, allow_pickle)
    files = [
        path
        for path in folder.iterdir()
        if path.suffix in PICKLE_SUFFIXES and not _TRAINER_FILES.fullmatch(path.name)
    ]
    if not files:
        raise CheckpointError(_nothing_found(reference, folder))
    single = folder / "pytorch_model.bin"
    files = [single] if single in files else files
    return _convert(
        reference, sorted(files, key=lambda p: _natural_order(p.name)), config, allow_pickle
    )


def _nothing_found(reference: str, folder: Path) -> str:
    found = (
        f"model {shown(reference)}, folder {folder}: expected {SINGLE_FILE}, numbered shards or an "
        "index"
    )
    if any(folder.glob("*.gguf")):
        return f"{found}, found GGUF files; {_conversion_advice('.gguf')}"
    if any(folder.glob("*.partial")):
        return f"{found}, found the unfinished output of a merge; resume that merge first"
    nested = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
    nested = [name for name in nested if name != STATISTICS_FOLDER]
    if nested:
        return (
            f"{found}, found weights only in {shown_names(sorted(set(nested)))}; name that folder"
        )
    return f"{found}, found no weights; check the path, or copy or download the model again"


def _convert(
    reference: str, files: list[Path], config: dict[str, Any] | None, allow_pickle: bool
) -> tuple[Header, ...]:
    if not allow_pickle:
        raise _pickles_refused(reference, files)
    # Without a config nothing tells which of two tied names a loader would miss, so both stay.
    keep_tied = config is None or tie_flag(config) is False
    return tuple(read_header(pickle.convert(path, keep_tied=keep_tied)) for path in files)


def _pickles_refused(reference: str, files: list[Path]) -> CheckpointError:
    return CheckpointError(
        f"model {shown(reference)}: expected safetensors files, found only PyTorch files "
        f"({shown_names([path.name for path in files])}); these are Python pickles, slow to open "
        "and able to hold code. Convert the model to safetensors, or give --allow-pickle to "
        "have it converted into the cache"
    )


def _build(
    reference: str,
    folder: Path | None,
    headers: tuple[Header, ...],
    config: dict[str, Any] | None,
    hub_id: str | None,
) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"model {shown(reference)}: expected tensor {shown(name)} once, found it in "
                    f"{tensors[name].file.name} and {header.path.name}; remove the file that is "
                    "left over"
                )
            tensors[name] = entry
    if not tensors:
        raise CheckpointError(
            f"model {shown(reference)}: expected tensors, found none in "
            f"{shown_names([header.path.name for header in headers])}; copy or download it again"
        )
    refuse_quantized_tensors(reference, tensors)
    tensors, warnings = with_scales(reference, tensors, config)
    return Checkpoint(reference, folder, headers, tensors, config, hub_id, warnings)
