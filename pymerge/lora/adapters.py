"""The adapters of a combination: opened, sorted by module, and checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pymerge.checkpoint import TensorEntry
from pymerge.checkpoint.adapter import Adapter, open_adapter, sort_tensors
from pymerge.checkpoint.adapter_config import MERGE_WITH_PEFT
from pymerge.checkpoint.config import read_json_object
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError, PlanError

#: What narrows target_modules down in a configuration.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class Factors:
    """One adapter's update of one module, scale * B A; B [out, rank] and A [rank, in], those of
    convolutions with kernel sizes behind."""

    adapter: int
    a: TensorEntry
    b: TensorEntry
    scale: float
    bias: TensorEntry | None
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def outer(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of B and A without the rank."""
        return (self.b.shape[0], *self.b.shape[2:]), self.a.shape[1:]


@dataclass(frozen=True)
class Adapters:
    """Adapters that can be combined.

    ``modules`` holds the updates of each module by those adapters that have one, ``others`` the
    tensors that are no factors, by PEFT's name without its prefix. ``fields`` are the
    configurations as they are.
    """

    opened: tuple[Adapter, ...]
    fields: tuple[dict[str, Any], ...]
    modules: dict[str, list[Factors]]
    others: dict[str, list[TensorEntry]]

    @property
    def base(self) -> str | None:
        """The base that they name; the first name of several for the same."""
        names = (fields.get("base_model_name_or_path") for fields in self.fields)
        return next((name for name in names if name), None)

    def agreed(self, field: str) -> Any:
        """A field of the configurations, None where they differ."""
        values = [fields.get(field) for fields in self.fields]
        return values[0] if all(value == values[0] for value in values) else None

    def target_modules(self) -> list[str] | str:
        """What names the modules of all adapters."""
        targets = [adapter.config.target_modules for adapter in self.opened]
        narrowed = any(fields.get(field) for fields in self.fields for field in _NARROWING)
        if not narrowed and all(isinstance(target, tuple) for target in targets):
            return sorted({name for target in targets for name in target or ()})
        if not narrowed and isinstance(targets[0], str) and len(set(targets)) == 1:
            return targets[0]
        return sorted(self.modules)

    def modules_to_save(self) -> list[str]:
        found: set[str] = set()
        for fields in self.fields:
            found |= set(fields.get("modules_to_save") or ())
        return sorted(found)

    def are_saved(self, name: str) -> bool:
        """Whether a tensor that is no factor belongs to a module that is saved whole; the others
        are biases."""
        module = name.rpartition(".")[0]
        return any(module.endswith(saved) for saved in self.modules_to_save())


def open_adapters(references: Sequence[str], *, allow_pickle: bool = False) -> Adapters:
    """Open adapters of one base. Raises CheckpointError, and PlanError where they do not fit."""
    opened = tuple(open_adapter(each, allow_pickle=allow_pickle) for each in references)
    fields = tuple(read_json_object(adapter.config.path) or {} for adapter in opened)
    modules: dict[str, list[Factors]] = {}
    others: dict[str, list[TensorEntry]] = {}
    for number, adapter in enumerate(opened):
        if adapter.config.use_dora:
            raise CheckpointError(
                f"{adapter.config.path}, field use_dora: expected false, found true: DoRA's "
                "magnitudes are not linear in the factors and cannot be combined with them; "
                + MERGE_WITH_PEFT
            )
        found, plain = sort_tensors(adapter.header)
        for module, parts in found.items():
            if adapter.config.is_target(module):
                modules.setdefault(module, []).append(_factors(adapter, number, module, parts))
                continue
            _refuse(
                next(iter(parts.values())),
                "a module that target_modules names, as PEFT leaves out all others",
                module,
            )
        for name, entry in plain.items():
            others.setdefault(_plain(name), []).append(entry)
    if not modules:
        raise CheckpointError(
            f"{opened[0].header.path}: expected factors lora_A and lora_B, found none in any of "
            f"{len(opened)} adapters; name folders that PEFT's save_pretrained wrote"
        )
    made = Adapters(opened, fields, modules, others)
    _check_bases(made)
    for name, group in modules.items():
        _check_module(opened, name, group)
    if len({adapter.config.fan_in_fan_out for adapter in opened}) > 1:
        _differ(made, "fan_in_fan_out")
    return made


def _plain(name: str) -> str:
    """The name without the wrapper of a saved module, which old files have."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    return f"{module}.{rest.rpartition('.')[2]}" if wrapper else name


def _factors(adapter: Adapter, number: int, module: str, parts: dict[str, TensorEntry]) -> Factors:
    is_embedding = any("embedding" in part for part in parts)
    kind = "lora_embedding_" if is_embedding else "lora_"
    first = next(iter(parts.values()))
    for part in (f"{kind}A", f"{kind}B"):
        if part not in parts:
            _refuse(first, f"{module}.{part} beside it", "none")
    for part, entry in parts.items():
        if part not in (f"{kind}A", f"{kind}B", "lora_B.bias"):
            _refuse(entry, f"only {kind}A and {kind}B for {module}", f"{part} beside them")
        if not entry.format.is_float or entry.format.bits < 16:
            _refuse(entry, "a floating type of 16 bits or more", entry.format.name)
    a, b = parts[f"{kind}A"], parts[f"{kind}B"]
    rank = adapter.config.rank_of(module)
    if len(a.shape) < 2 or a.shape[0] != rank:
        _refuse(a, f"[{rank}, ...] by the rank in the configuration", f"{list(a.shape)}")
    if len(b.shape) < 2 or b.shape[1] != rank or b.num_elements != b.shape[0] * rank:
        _refuse(b, f"[out, {rank}] by the rank in the configuration", f"{list(b.shape)}")
    bias = parts.get("lora_B.bias")
    if bias is not None and bias.shape != b.shape[:1]:
        _refuse(bias, f"[{b.shape[0]}] as the outputs of lora_B", f"{list(bias.shape)}")
    return Factors(number, a, b, adapter.config.scale_of(module), bias, is_embedding)


def _check_bases(made: Adapters) -> None:
    names: dict[str, str] = {}
    for fields in made.fields:
        name = fields.get("base_model_name_or_path")
        if isinstance(name, str) and name.strip():
            names.setdefault(name.rstrip("/").rpartition("/")[2].casefold(), name)
    if len(names) > 1:
        _differ(made, "base_model_name_or_path")


def _check_module(opened: Sequence[Adapter], name: str, group: Sequence[Factors]) -> None:
    first = group[0]
    for other in group[1:]:
        if (other.outer, other.is_embedding) != (first.outer, first.is_embedding):
            raise PlanError(
                f"{opened[other.adapter].header.path}, module {name}: expected factors of the "
                f"shapes of {opened[first.adapter].reference}, A {list(first.a.shape)} and B "
                f"{list(first.b.shape)} but for the rank, found {list(other.a.shape)} and "
                f"{list(other.b.shape)}; combine adapters of one base"
            )


def _differ(made: Adapters, field: str) -> NoReturn:
    values = [
        f"{shown(fields.get(field))} in {adapter.reference}"
        for adapter, fields in zip(made.opened, made.fields, strict=True)
    ]
    raise PlanError(
        f"adapter_config.json, field {field}: expected the same in all adapters, found "
        f"{', '.join(values)}; combine adapters of one base, or correct the field where it names "
        "the same one differently"
    )


def _refuse(entry: TensorEntry, expected: str, found: str) -> NoReturn:
    raise CheckpointError(
        f"{entry.file}, tensor {shown(entry.name)}: expected {expected}, found {found}; copy, "
        "download or save the adapter again"
    )


def formats_of(groups: Iterable[Sequence[Factors]]) -> list[Any]:
    """The formats of all factors."""
    return [entry.format for group in groups for each in group for entry in (each.a, each.b)]
