"""Writing the folder of an adapter, whole or not at all.

1. A folder with a name of its own is made beside the output; no program takes it for an adapter.
2. Room for the largest header that can come is left at the start of the weights file, and the
   tensors are appended as they are made: their ranks, and so their sizes, are known only then.
3. The header is written, padded with spaces to that room as the format allows, and then the
   configuration; both files are synced.
4. The folder is renamed to the output's name, in place of the old adapter if there is one. Until
   then nothing of that name has changed; what a killed run leaves is the folder of step 1.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pymerge.checkpoint.adapter import ADAPTER_FILE
from pymerge.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from pymerge.checkpoint.header import LENGTH_BYTES
from pymerge.checkpoint.layout import METADATA, OutputTensor, encode_header
from pymerge.errors import PlanError, StorageError
from pymerge.lora.read import Bytes

#: What an adapter's folder may hold beside its two files when it is replaced.
_BESIDE = {ADAPTER_FILE, ADAPTER_CONFIG_NAME, "README.md"}


class AdapterFolder:
    """The folder of an adapter while it is written.

    :param largest: the tensors that may come, in their largest shapes.
    :raises PlanError: the output exists and is no empty folder, or with ``overwrite`` holds more
        than an adapter.
    """

    def __init__(self, out: Path, largest: Sequence[OutputTensor], *, overwrite: bool) -> None:
        self._out = Path(os.path.abspath(out))
        self._overwrite = overwrite
        self._check()
        self._room = len(encode_header(largest, METADATA))
        self._tensors: list[OutputTensor] = []

    def __enter__(self) -> AdapterFolder:
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._folder = self._out.with_name(f".{self._out.name}.{secrets.token_hex(4)}.partial")
            self._folder.mkdir()
            self._file = open(self._folder / ADAPTER_FILE, "wb", buffering=0)
            self._file.seek(self._room)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, tensor: OutputTensor, data: Iterable[Bytes]) -> None:
        """Append a tensor. Raises StorageError."""
        try:
            for piece in data:
                left = memoryview(piece.data)
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failure(error) from error
        self._tensors.append(tensor)

    def commit(self, config: Mapping[str, Any]) -> int:
        """Give the folder its name; returns the bytes of the weights file. Raises StorageError."""
        header = encode_header(self._tensors, METADATA)
        text = header[LENGTH_BYTES:].ljust(self._room - LENGTH_BYTES, b" ")
        try:
            self._file.seek(0)
            self._file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            os.fsync(self._file.fileno())
            num_bytes = os.fstat(self._file.fileno()).st_size
            with open(self._folder / ADAPTER_CONFIG_NAME, "w", encoding="utf-8") as file:
                json.dump(config, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            self._check()
            self._take_name()
            _sync(self._out.parent)
        except OSError as error:
            raise self._failure(error) from error
        return num_bytes

    def _take_name(self) -> None:
        old = None
        if self._out.exists() and any(self._out.iterdir()):
            old = self._folder.with_name(f"{self._folder.name}.old")
            self._out.rename(old)
        _sync(self._folder)
        try:
            self._folder.rename(self._out)
        except OSError:
            if old is not None:
                old.rename(self._out)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _check(self) -> None:
        if not os.path.lexists(self._out):
            return
        if not self._out.is_dir() or self._out.is_symlink():
            raise PlanError(
                f"output {self._out}: expected a new or empty folder, found a file or a link; "
                "choose another output"
            )
        names = {path.name for path in self._out.iterdir()}
        if not names:
            return
        others = sorted(names - _BESIDE)
        if others or ADAPTER_CONFIG_NAME not in names:
            found = ", ".join((others or sorted(names))[:5])
            raise PlanError(
                f"output {self._out}: expected a new or empty folder, found {found} there; choose "
                "another output"
            )
        if not self._overwrite:
            raise PlanError(
                f"output {self._out}: expected a new or empty folder, found an adapter; choose "
                "another output, or overwrite it (--overwrite)"
            )

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"writing the adapter {self._out} failed: {error}; free some space or choose another "
            "output, then run again"
        )


def _sync(folder: Path) -> None:
    with suppress(PermissionError):  # a folder that may be written but not read
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
