"""Converting PyTorch files to safetensors in the user's cache, once for each file.

1. The name in the cache is a hash of the file's real path, size and modification time.
2. The file is opened with ``weights_only=True``, so that no code in it runs, and memory-mapped.
3. The safetensors file is written tensor by tensor under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.cache import cache_folder
from pymerge.checkpoint.layout import OutputTensor, encode_header
from pymerge.checkpoint.strict_json import is_text, shown
from pymerge.errors import CheckpointError, StorageError
from pymerge.formats import BY_TORCH_NAME

if TYPE_CHECKING:
    import torch

WRITE_BYTES = 64 << 20
#: Under which key programs keep the weights when the file holds more.
_WRAPPER_KEYS = ("state_dict", "model_state_dict")


def convert(path: Path, *, keep_tied: bool) -> Path:
    """The safetensors copy of a PyTorch file, made now unless the cache has it.

    Of tensors that are one and the same memory (an output head tied to the embedding) only the
    first is kept, as transformers does, and the others are named in the metadata; ``keep_tied``
    keeps all. Raises CheckpointError where the file holds anything but tensors, StorageError where
    writing fails.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{keep_tied}"
    folder = cache_folder() / "converted" / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    target = folder / f"{path.stem}.safetensors"
    if target.exists():
        return target
    tensors = _load(path)
    dropped = {} if keep_tied else _tied_names(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    try:
        _write(target, kept, {"format": "pt", **dropped})
    except OSError as error:
        raise StorageError(
            f"{target}: writing the converted copy of {path} failed: {error.strerror}; free some "
            "space, or set PYMERGE_CACHE to a folder on another disk"
        ) from None
    return target


def _load(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises whatever its unpickler meets in a damaged or hostile file.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: expected a PyTorch file with tensors only, found one that "
            f"torch.load(weights_only=True) refuses ({type(error).__name__}: {reason[:200]}); "
            "convert the model to safetensors"
        ) from None
    for wrapper in _WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a mapping of names to tensors, found {type(content).__name__}; "
            "convert the model to safetensors"
        )
    for name, value in content.items():
        _check(path, name, value)
    return dict(content)


def _check(path: Path, name: object, value: Any) -> None:
    import torch

    if not is_text(name) or not name or name == "__metadata__":
        raise CheckpointError(f"{path}: expected names of tensors, found the key {shown(name)}")
    if not isinstance(value, torch.Tensor):
        found = type(value).__name__
    elif value.layout != torch.strided or value.is_quantized or value.is_meta:
        found = "a sparse, quantised or empty (meta) tensor"
    elif _dtype_name(value) not in BY_TORCH_NAME:
        found = f"a tensor of {_dtype_name(value)}"
    else:
        return
    raise CheckpointError(
        f"{path}, tensor {shown(name)}: expected a plain tensor, found {found}; "
        "convert the model to safetensors"
    )


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tied_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name -> the earlier name that is exactly the same memory."""
    first: dict[tuple[Any, ...], str] = {}
    dropped = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place in first:
            dropped[name] = first[place]
        else:
            first[place] = name
    return dropped


def _write(target: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    import torch

    layout = [
        OutputTensor(name, BY_TORCH_NAME[_dtype_name(tensor)], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(encode_header(layout, metadata)))
            for tensor in tensors.values():
                flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
                if flat.numel():
                    _write_all(file.fileno(), flat.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data[:WRITE_BYTES]) :]
