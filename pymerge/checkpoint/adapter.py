"""LoRA adapters as PEFT saves them: which tensors of the base they change, and how.

An adapter holds for a module with weight W two small matrices A and B of rank r, and means

    W + s B A                       s = alpha / r; s (B A)^T where W is stored as [in, out]
    m (W + s B A) / |W + s B A|     DoRA: m and the norm for each output of the module

beside tensors that it replaces as they are (modules_to_save, biases, embeddings). Nothing is
computed here: a checkpoint with an adapter names for each changed tensor what must be done to the
base's bytes when they are read. Where A and B lie in the file they are called after their places
in W as it is stored: ``left`` [rows, rank] and ``right`` [rank, columns].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pymerge.checkpoint import hub, pickle
from pymerge.checkpoint.adapter_config import (
    ADAPTER_CONFIG_NAME,
    AdapterConfig,
    read_adapter_config,
)
from pymerge.checkpoint.config import TEXT_KEYS
from pymerge.checkpoint.derived import DerivedTensor
from pymerge.checkpoint.header import Header, TensorEntry, read_header
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError
from pymerge.formats import Format
from pymerge.names import nearest

if TYPE_CHECKING:
    from pymerge.checkpoint.source import Checkpoint

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
HEADS = ("lm_head", "embed_out")

_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.([^.]+))?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.(lora_embedding_[AB])(?:\.([^.]+))?")
_MAGNITUDE = re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight of ``rows`` by ``columns`` elements: scale * left @ right.

    ``left`` lies in its file as [rows, rank] and ``right`` as [rank, columns]; with ``transposed``
    each as its transpose. ``right`` None stands for ones [1, columns]. With ``magnitude`` the sum
    is divided by its norm and multiplied by the magnitude: for each row, with ``transposed`` for
    each column.
    """

    left: TensorEntry
    right: TensorEntry | None
    rank: int
    rows: int
    columns: int
    scale: float
    transposed: bool = False
    magnitude: TensorEntry | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The adapter's tensors, in the order left, right, magnitude."""
        found = (self.left, self.right, self.magnitude)
        return tuple(entry for entry in found if entry is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrices and the magnitude as float32 in memory, with what their norms and
        their reading take."""
        matrices = (self.rows + self.columns) * self.rank
        norms = 6 * max(self.rows, self.columns) if self.magnitude is not None else 0
        return 4 * (matrices + max(self.rows, self.columns) * self.rank + norms)


@dataclass(frozen=True)
class AdapterTensor(TensorEntry):
    """A tensor of a base with an adapter: the bytes at ``offset`` of ``file``, with ``update`` on
    them where there is one.

    ``nominal`` is the format that the base stores the tensor in.
    """

    update: LowRank | None
    nominal: Format


def update_of(entry: TensorEntry) -> LowRank | None:
    """What must be done to a tensor's bytes, None where they are the tensor."""
    return entry.update if isinstance(entry, AdapterTensor) else None


def nominal_format(entry: TensorEntry) -> Format:
    """The format that a tensor counts as where formats are compared."""
    return entry.nominal if isinstance(entry, (AdapterTensor, DerivedTensor)) else entry.format


@dataclass(frozen=True)
class Adapter:
    """An adapter whose configuration and header were read."""

    reference: str
    folder: Path
    config: AdapterConfig
    header: Header


def holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def open_adapter(reference: str, *, allow_pickle: bool = False) -> Adapter:
    """Open the folder of an adapter or one on the hub (``id`` or ``id@revision``).

    Raises CheckpointError.
    """
    try:
        is_local = bool(reference) and Path(reference).exists()
    except (OSError, ValueError):
        is_local = False
    folder = Path(reference) if is_local else hub.download(reference, allow_pickle=allow_pickle)
    if not folder.is_dir():
        raise CheckpointError(
            f"adapter {shown(reference)}: expected a folder with {ADAPTER_CONFIG_NAME} and "
            f"{ADAPTER_FILE}, found a file; name its folder"
        )
    config = read_adapter_config(folder)
    if (folder / ADAPTER_FILE).exists():
        return Adapter(reference, folder, config, read_header(folder / ADAPTER_FILE))
    if not (folder / ADAPTER_PICKLE).exists():
        raise CheckpointError(
            f"adapter {shown(reference)}, folder {folder}: expected {ADAPTER_FILE}, found none; "
            "copy or download the adapter again"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"adapter {shown(reference)}: expected {ADAPTER_FILE}, found only {ADAPTER_PICKLE}, a "
            "Python pickle; save the adapter as safetensors, or give --allow-pickle to have it "
            "converted into the cache"
        )
    converted = pickle.convert(folder / ADAPTER_PICKLE, keep_tied=True)
    return Adapter(reference, folder, config, read_header(converted))


def sort_tensors(
    header: Header,
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """The tensors of an adapter: module -> part (``lora_A``, ``lora_embedding_B``, ``lora_B.bias``,
    ``lora_magnitude_vector``, ...) -> tensor; and the others by their names, without PEFT's prefix.

    Raises CheckpointError where a part comes twice or the file holds several adapters.
    """
    modules: dict[str, dict[str, TensorEntry]] = {}
    others: dict[str, TensorEntry] = {}
    adapters: set[str] = set()
    for key, entry in header.tensors.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if match is None:
            others[name] = entry
            continue
        module, part, adapter = match[1], match[2], match[3]
        if adapter is not None:
            adapters.add(adapter)
        if match.re is _FACTOR and match[4] == "bias":
            part += ".bias"
        parts = modules.setdefault(module, {})
        if part in parts:
            raise CheckpointError(
                f"{header.path}, tensor {shown(entry.name)}: expected one {part} for a module, "
                f"found a second one beside {parts[part].name}; copy, download or save the adapter "
                "again"
            )
        parts[part] = entry
    if len(adapters) > 1:
        raise CheckpointError(
            f"{header.path}: expected one adapter, found {', '.join(sorted(adapters))}; save each "
            "into a folder of its own"
        )
    return modules, others


def base_of(adapter: Adapter) -> str:
    """The base that the adapter's configuration names. Raises CheckpointError where it does not."""
    if adapter.config.base is None:
        raise CheckpointError(
            f"{adapter.config.path}, field base_model_name_or_path: expected the model that the "
            "adapter belongs to, found nothing; write the model as base+adapter"
        )
    return adapter.config.base


def apply_adapter(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base with the adapter on it.

    Raises CheckpointError for tensors of the adapter that have no place in the base, or whose
    shapes do not fit.
    """
    tensors, own_head = _Application(base, adapter).tensors()
    config = base.config
    if own_head:
        config = _untied(config or {})
    warnings = base.warnings
    named = adapter.config.base
    if named is not None and _last_part(named) != _last_part(base.reference):
        warnings += (
            f"the adapter {adapter.reference} was made for {named} by its {ADAPTER_CONFIG_NAME} "
            f"and is put on {base.reference}",
        )
    return replace(
        base,
        reference=f"{base.reference}+{adapter.reference}",
        headers=(*base.headers, adapter.header),
        tensors=tensors,
        config=config,
        warnings=warnings,
    )


def _last_part(reference: str) -> str:
    """The name without owner, folders and revision: people keep it when they move a model."""
    return reference.partition("@")[0].rstrip("/").rpartition("/")[2].casefold()


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**config, "tie_word_embeddings": False}
    for key in TEXT_KEYS:
        if isinstance(config.get(key), dict) and "tie_word_embeddings" in config[key]:
            changed[key] = {**config[key], "tie_word_embeddings": False}
    return changed


class _Application:
    """One adapter on one base."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self._config = adapter.config
        self._file = adapter.header.path
        #: Module -> part of the name -> tensor.
        self._modules: dict[str, dict[str, TensorEntry]] = {}
        self._replaced: dict[str, TensorEntry] = {}
        self._changes = dict(base.tensors)

    def tensors(self) -> tuple[dict[str, TensorEntry], bool]:
        """The tensors of the result, and whether the adapter brings a head of its own for a base
        that ties it."""
        self._sort()
        own_head = False
        for name, entry in self._replaced.items():
            own_head |= self._replace(name, entry)
        for module, parts in self._modules.items():
            self._update(module, parts)
        return self._changes, own_head

    def _sort(self) -> None:
        """Tell the parts of each module and the tensors that replace others."""
        self._modules, others = sort_tensors(self._adapter.header)
        self._replaced = {self._plain(name): entry for name, entry in others.items()}

    def _plain(self, name: str) -> str:
        """The model's name of a tensor that PEFT keeps in a wrapper of the module."""
        name = name.replace(".base_layer.", ".")
        module, wrapper, rest = name.partition(".modules_to_save.")
        if not wrapper:
            return name
        # Old files have the adapter's name behind the wrapper's, others have not.
        names = (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}")
        return next((each for each in names if self._locate(each) is not None), names[0])

    def _replace(self, name: str, entry: TensorEntry) -> bool:
        """Take a whole tensor from the adapter."""
        found = self._locate(name)
        own_head = self._is_tied_head(name.removesuffix(".weight"))
        if found is None:
            if not own_head:
                self._unmatched(entry, name)
            self._changes[name] = replace(entry, name=name)
            return True
        there = self._changes[found]
        if entry.shape != there.shape:
            self._refuse(
                entry,
                f"shape {list(there.shape)} as {found} of {self._base.reference}",
                f"{list(entry.shape)}",
                "resize the base as for the training (resize_token_embeddings), save it, and name "
                "that as the base",
            )
        self._changes[found] = AdapterTensor(
            found,
            entry.format,
            entry.shape,
            entry.file,
            entry.offset,
            entry.num_bytes,
            None,
            nominal_format(there),
        )
        return own_head

    def _update(self, module: str, parts: Mapping[str, TensorEntry]) -> None:
        """Put the update of one module on its weight, and on its bias."""
        first = next(iter(parts.values()))
        if not self._config.is_target(module):
            self._refuse(
                first,
                "a module that target_modules names, as PEFT leaves out all others",
                f"{module}",
                f"correct {ADAPTER_CONFIG_NAME} or save the adapter again",
            )
        is_embedding = any("embedding" in part for part in parts)
        kind = "lora_embedding_" if is_embedding else "lora_"
        a, b = (self._part(module, parts, kind + letter) for letter in "AB")
        if self._is_tied_head(module):
            self._refuse(
                first,
                "a base with an output head of its own",
                f"{self._base.reference}, whose head is its embedding",
                "untie the base (tie_word_embeddings false, with a copy of the embedding as the "
                "head), save it, and name that as the base",
            )
        found = self._locate(f"{module}.weight")
        if found is None:
            self._unmatched(first, f"{module}.weight")
        weight = self._changes[found]
        if not weight.format.is_float:
            self._refuse(
                first,
                f"a base of plain weights, {found} in a floating type",
                f"{weight.format.name}",
                "use the unquantised base",
            )
        update = self._low_rank(module, weight, a, b, is_embedding)
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != self._config.use_dora:
            self._refuse(
                magnitude or first,
                "a magnitude vector for each module if and only if use_dora is true",
                f"use_dora {str(self._config.use_dora).lower()} and "
                f"{'a' if magnitude else 'no'} magnitude vector for {module}",
                "save the adapter again",
            )
        if magnitude is not None:
            count = update.columns if update.transposed else update.rows
            if math.prod(magnitude.shape) != count:
                self._refuse(magnitude, f"{count} elements", f"shape {list(magnitude.shape)}")
            update = replace(update, magnitude=magnitude)
        self._check_floats(update)
        self._set(found, weight, update)
        bias = parts.get("lora_B.bias")
        if bias is not None:
            self._update_bias(module, bias)
        known = {f"{kind}A", f"{kind}B", "lora_B.bias", "lora_magnitude_vector"}
        for part, entry in parts.items():
            if part not in known:
                self._refuse(entry, f"only {kind}A and {kind}B for {module}", f"{part} beside them")

    def _low_rank(
        self, module: str, weight: TensorEntry, a: TensorEntry, b: TensorEntry, is_embedding: bool
    ) -> LowRank:
        """The update of a weight by A [rank, in] and B [out, rank]; those of a convolution have
        kernel sizes behind, B's all 1."""
        rank = self._config.rank_of(module)
        if not a.shape or a.shape[0] != rank:
            self._refuse(
                a, f"[{rank}, ...] by the rank in {ADAPTER_CONFIG_NAME}", f"{list(a.shape)}"
            )
        num_out = b.shape[0] if b.shape else 0
        if len(b.shape) < 2 or b.shape[1] != rank or math.prod(b.shape) != num_out * rank:
            self._refuse(
                b, f"[out, {rank}] by the rank in {ADAPTER_CONFIG_NAME}", f"{list(b.shape)}"
            )
        num_in = math.prod(a.shape[1:])
        rows = weight.shape[0] if weight.shape else 1
        columns = math.prod(weight.shape[1:])
        straight = (num_out, num_in) == (rows, columns) and a.shape[1:] == weight.shape[1:]
        turned = (num_in, num_out) == (rows, columns) and len(weight.shape) == 2
        if is_embedding:
            straight = False
        if not straight and not turned:
            self._refuse(
                a,
                f"A and B for the base's {weight.name} {list(weight.shape)}",
                f"A {list(a.shape)} and B {list(b.shape)}",
                "check that the adapter belongs to this base",
            )
        transposed = self._turned_like(module) if straight and turned else turned
        scale = self._config.scale_of(module)
        left, right = (a, b) if transposed else (b, a)
        return LowRank(left, right, rank, rows, columns, scale, transposed)

    def _turned_like(self, module: str) -> bool:
        """Whether a square weight is stored as [in, out]: as those of the modules of the same name
        whose shape tells, else as the configuration says, where PEFT notes what it found last."""
        leaf = module.rpartition(".")[2]
        for other, parts in self._modules.items():
            a, b = parts.get("lora_A"), parts.get("lora_B")
            name = self._locate(f"{other}.weight")
            if other.rpartition(".")[2] != leaf or a is None or b is None or name is None:
                continue
            shape = self._base.tensors[name].shape
            if len(shape) == 2 and shape[0] != shape[1]:
                return shape == (a.shape[-1], b.shape[0])
        return self._config.fan_in_fan_out

    def _update_bias(self, module: str, bias: TensorEntry) -> None:
        """``lora_bias``: s times the bias of B is added to the module's."""
        found = self._locate(f"{module}.bias")
        if found is None:
            self._refuse(
                bias,
                f"a bias of {module} in the base to add it to",
                "none",
                "PEFT cannot merge this adapter either",
            )
        there = self._changes[found]
        if there.shape != bias.shape:
            self._refuse(bias, f"shape {list(there.shape)} as {found}", f"{list(bias.shape)}")
        num = math.prod(bias.shape)
        update = LowRank(bias, None, 1, num, 1, self._config.scale_of(module))
        self._check_floats(update)
        self._set(found, there, update)

    def _set(self, name: str, there: TensorEntry, update: LowRank) -> None:
        if update_of(there) is not None:
            self._refuse(update.left, f"one update of {name}", "a second one")
        if isinstance(there, DerivedTensor):
            self._refuse(
                update.left,
                f"{name} of {self._base.reference} stored as plain weights",
                f"it made of {there.stored[0].format.name} elements as it is read",
                "name the unquantised base, or merge that model alone first, by passthrough: its "
                "output is plain",
            )
        self._changes[name] = AdapterTensor(
            name,
            there.format,
            there.shape,
            there.file,
            there.offset,
            there.num_bytes,
            update,
            nominal_format(there),
        )

    def _check_floats(self, update: LowRank) -> None:
        for entry in update.entries:
            if not entry.format.is_float or entry.format.bits < 16:
                self._refuse(entry, "a floating type of 16 bits or more", f"{entry.format.name}")

    def _part(self, module: str, parts: Mapping[str, TensorEntry], part: str) -> TensorEntry:
        if part not in parts:
            self._refuse(next(iter(parts.values())), f"{module}.{part} beside it", "none")
        return parts[part]

    def _locate(self, name: str) -> str | None:
        """The base's name of a tensor: files may lack the first part of the names that a model's
        class gives its modules, or have one more."""
        tensors = self._base.tensors
        if name in tensors:
            return name
        shorter = name.partition(".")[2]
        found = [shorter] if shorter in tensors and "." in shorter else []
        found += [t for t in tensors if t.partition(".")[2] == name]
        return found[0] if len(found) == 1 else None

    def _is_tied_head(self, module: str) -> bool:
        return module.rpartition(".")[2] in HEADS and self._base.tied_embeddings

    def _unmatched(self, entry: TensorEntry, name: str) -> NoReturn:
        match = nearest(name, self._base.tensors)
        hint = f" (the nearest name is {shown(match)})" if match else ""
        self._refuse(
            entry,
            f"the tensor {shown(name)} in {self._base.reference} for it",
            f"none{hint}",
            "check that the adapter belongs to this base",
        )

    def _refuse(
        self,
        entry: TensorEntry,
        expected: str,
        found: str,
        advice: str = "copy, download or save the adapter again",
    ) -> NoReturn:
        raise CheckpointError(
            f"{self._file}, tensor {shown(entry.name)}: expected {expected}, found {found}; "
            f"{advice}"
        )
