"""adapter_config.json of a LoRA adapter, as PEFT writes it: rank, scale and place of each update.

Only what changes the merged weights is read. What would change them in a way that is not computed
here is refused; what matters in training alone is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pymerge.checkpoint.config import read_json_object
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import CheckpointError

ADAPTER_CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"

#: Variants of LoRA whose weights are more than W + s B A, with what they are.
_VARIANTS = {
    "layer_replication": "layers that are repeated",
    "target_parameters": "updates of parameters instead of modules (experts)",
    "trainable_token_indices": "rows of the embedding that are trained by themselves",
    "alora_invocation_tokens": "an update that begins at certain tokens (aLoRA)",
    "arrow_config": "a router over several adapters (Arrow)",
    "use_qalora": "updates of quantised groups (QALoRA)",
    "use_bdlora": "block-diagonal updates (BD-LoRA)",
    "kasa_config": "updates of singular values (KaSA)",
    "velora_config": "compressed updates (VeLoRA)",
    "monteclora_config": "sampled updates (MonteCLoRA)",
}
#: Initialisations that take something out of the base's weights whenever the adapter is loaded.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE_WITH_PEFT = (
    "merge the adapter into its base with PEFT (merge_and_unload, save_pretrained) and name the "
    "result"
)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of the weights.

    ``base`` is the base's reference with its revision, None where the file names none.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    fan_in_fan_out: bool
    use_rslora: bool
    use_dora: bool

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / rank, with rsLoRA alpha / sqrt(rank), of a module by its name in the model."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether ``target_modules`` names the module: a pattern for the whole name, or a list of
        names or ends of names. PEFT leaves out what a file holds for other modules."""
        targets = self.target_modules
        if targets is None or targets == ALL_LINEAR:
            return True
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in targets)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first key that matches the name from its beginning or from a dot to its end, as in PEFT;
    the name itself where none does."""
    matches = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, module)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises CheckpointError where there is none, or for an adapter that is no LoRA we compute."""
    path = folder / ADAPTER_CONFIG_NAME
    fields = read_json_object(path)
    if fields is None:
        raise CheckpointError(
            f"adapter {folder}: expected {ADAPTER_CONFIG_NAME}, found none; name the folder that "
            "PEFT's save_pretrained wrote"
        )
    reader = _Reader(path, fields)
    kind = fields.get("peft_type")
    if kind != "LORA":
        _refuse(path, "peft_type", "'LORA'", shown(kind), f"for other adapters: {MERGE_WITH_PEFT}")
    for name, meaning in _VARIANTS.items():
        if fields.get(name):
            _refuse(path, name, "nothing", f"{meaning}: {shown(fields[name])}", MERGE_WITH_PEFT)
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        _refuse(
            path,
            "init_lora_weights",
            "an adapter of the base as it is",
            f"{shown(start)}, which takes a part out of the base's weights when it is loaded",
            "save the adapter with path_initial_model_for_weight_conversion, or " + MERGE_WITH_PEFT,
        )
    if fields.get("quantization_config"):
        _refuse(path, "quantization_config", "none", "a quantised adapter", MERGE_WITH_PEFT)
    return AdapterConfig(
        path=path,
        base=reader.base(),
        rank=reader.count("r", fields.get("r", 8)),
        alpha=reader.number("lora_alpha", fields.get("lora_alpha", 8)),
        rank_pattern={k: reader.count(f"rank_pattern, {k}", v) for k, v in reader.pattern("rank")},
        alpha_pattern={
            k: reader.number(f"alpha_pattern, {k}", v) for k, v in reader.pattern("alpha")
        },
        target_modules=reader.targets(),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        use_rslora=reader.flag("use_rslora"),
        use_dora=reader.flag("use_dora"),
    )


class _Reader:
    """Typed access to the fields; what PEFT leaves out is its default."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = fields

    def base(self) -> str | None:
        name, revision = (self._fields.get(k) for k in ("base_model_name_or_path", "revision"))
        if not isinstance(name, str) or not name.strip():
            return None
        return f"{name}@{revision}" if isinstance(revision, str) and revision else name

    def count(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            self._mistake(name, "a positive whole number", value)
        return value

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            self._mistake(name, "a number", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            self._mistake(name, "true or false", value)
        return bool(value)

    def pattern(self, kind: str) -> list[tuple[str, Any]]:
        name = f"{kind}_pattern"
        value = self._fields.get(name) or {}
        if not isinstance(value, dict):
            self._mistake(name, "an object of patterns for module names", value)
        for key in value:
            self._check_pattern(name, key)
        return list(value.items())

    def targets(self) -> str | tuple[str, ...] | None:
        value = self._fields.get("target_modules")
        if isinstance(value, str):
            if value != ALL_LINEAR:
                self._check_pattern("target_modules", value)
            return value
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._mistake("target_modules", "names of modules or a pattern", value)
        return tuple(value)

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            self._mistake(name, f"a regular expression ({error})", pattern)

    def _mistake(self, name: str, expected: str, found: Any) -> NoReturn:
        _refuse(self._path, name, expected, shown(found), "correct the file or save it again")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _refuse(path: Path, field: str, expected: str, found: str, advice: str) -> NoReturn:
    raise CheckpointError(f"{path}, field {field}: expected {expected}, found {found}; {advice}")
