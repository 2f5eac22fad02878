"""What may become of each module when a LoRA is extracted: factors, a whole copy, or nothing.

Only headers are looked at. A linear layer is told from an embedding by its name, as the files do
not say which is which.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pymerge.checkpoint import Checkpoint, TensorEntry, update_of
from pymerge.checkpoint.adapter import HEADS
from pymerge.checkpoint.strict_json import shown
from pymerge.errors import PlanError
from pymerge.names import nearest

Kind = Literal["linear", "conv1d", "embedding"]

#: transformers' models whose linear layers are stored as [in, out], and what these are called.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
#: The first part that a class gives to names which old files of its model lack.
MODEL_PREFIXES = {"gpt2": "transformer"}
_EMBEDDING = re.compile(r"w[tp]e|shared|relative_attention_bias|embed(_\w+)?|(\w+_)?embeddings?")
#: Tables of words, which an output head may share.
_WORDS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared", "tok_embeddings")
#: The tensors that a module of PEFT's modules_to_save may consist of.
_OF_MODULES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_WITH_LM_HEAD = re.compile(r"(CausalLM|LMHeadModel|ConditionalGeneration)$")


@dataclass(frozen=True)
class Pair:
    """A tensor of the model and the base's; None where the base has none."""

    model: TensorEntry
    base: TensorEntry | None


#: A module's tensors by the last part of their names.
Parts = dict[str, Pair]


@dataclass(frozen=True)
class LowRankModule:
    """A module whose change is decomposed."""

    name: str
    kind: Kind
    weight: TensorEntry
    base: TensorEntry
    parts: Parts

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.kind == "linear" else (columns, rows)


@dataclass
class Division:
    """The modules of a model by what becomes of them: ``whole`` are copied where they changed, or
    where the user demands it. ``tied`` is the embedding that is the output head, too; ``tensors``
    are the full names of all."""

    low_rank: list[LowRankModule] = field(default_factory=list)
    whole: dict[str, Parts] = field(default_factory=dict)
    demanded: set[str] = field(default_factory=set)
    left_out: dict[str, Parts] = field(default_factory=dict)
    tied: str | None = None
    tensors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What the user asks for; see :func:`pymerge.extract_lora`."""

    include: Sequence[re.Pattern[str]]
    exclude: Sequence[re.Pattern[str]]
    embed: bool
    save_modules: Collection[str]

    def takes(self, module: str) -> bool:
        if any(pattern.search(module) for pattern in self.exclude):
            return False
        return not self.include or any(pattern.search(module) for pattern in self.include)

    def demands(self, module: str) -> bool:
        return module in self.save_modules or module.rpartition(".")[2] in self.save_modules


def divide(base: Checkpoint, model: Checkpoint, choice: Choice) -> Division:
    """Raises PlanError where the two models do not fit together."""
    modules = _modules(base, model)
    division = Division(
        tensors=[f"{name}.{part}" for name, parts in modules.items() for part in parts]
    )
    _check_demands(model, modules, choice)
    is_tied = model.tied_embeddings and base.tied_embeddings
    for name, parts in modules.items():
        leaf = name.rpartition(".")[2]
        if not choice.demands(name) and not choice.takes(name):
            division.left_out[name] = parts
            continue
        _refuse_adapters(parts)
        kind = _kind(model, name)
        if is_tied and leaf in _WORDS:
            division.tied = name
        is_table = kind == "embedding" or leaf in HEADS
        as_asked = is_table and (not choice.embed or division.tied == name)
        if choice.demands(name):
            division.demanded.add(name)
        elif not as_asked and (module := _low_rank(name, kind, parts, is_table, division)):
            division.low_rank.append(module)
            continue
        division.whole[name] = parts
    if division.tied and choice.embed:
        division.warnings.append(
            f"{division.tied} is the output head, too, which factors of the embedding would not "
            "change in PEFT: where it changed it is saved whole"
        )
    return division


def head_of(model: Checkpoint) -> str | None:
    """The name of the output head that is tied to the embedding; None where it cannot be told."""
    architectures = (model.config or {}).get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return "lm_head" if _WITH_LM_HEAD.search(str(first)) else None


def refuse_unfit(name: str, parts: Parts) -> None:
    """:raises PlanError: a changed module consists of tensors that no adapter can hold."""
    for part, pair in parts.items():
        if part in _OF_MODULES:
            continue
        what = "a parameter that is no module's weight or bias"
        if len(pair.model.shape) > 2:
            what = "a stack of matrices that is no module's weight (experts)"
        raise PlanError(
            f"{pair.model.file}, tensor {shown(pair.model.name)}: expected weights of modules, "
            f"found {what} in a module that differs from the base's; PEFT's LoRA of modules cannot "
            f"hold it: leave {name or 'it'} out (--exclude), or split the stack into linear layers"
        )


def _check_demands(model: Checkpoint, modules: Collection[str], choice: Choice) -> None:
    known = {*modules, *(module.rpartition(".")[2] for module in modules)}
    for name in choice.save_modules:
        if name in known:
            continue
        match = nearest(name, known)
        hint = f"; the nearest is {match}" if match else ""
        raise PlanError(
            f"save_modules: expected modules of {model.reference} that hold tensors, found "
            f"{shown(name)}{hint}"
        )


def _low_rank(
    name: str, kind: Kind, parts: Parts, is_table: bool, division: Division
) -> LowRankModule | None:
    """The module to decompose; None where it can only be saved whole."""
    pair = parts.get("weight")
    if pair is None or parts.keys() - {"weight", "bias"}:
        return None
    model, base = pair.model, pair.base
    if base is None:
        division.warnings.append(
            f"{name} is not in the base and is saved whole: load the adapter on a model that has it"
        )
        return None
    if model.shape != base.shape:
        if not is_table:
            raise _unlike(pair)
        division.warnings.append(
            f"{name} is {list(model.shape)} and {list(base.shape)} in the base, and is saved "
            "whole; resize the base (resize_token_embeddings) before the adapter is loaded"
        )
        return None
    floats = model.format.is_float and base.format.is_float
    if len(model.shape) != 2 or not floats or not model.num_elements:
        return None
    bias = parts.get("bias")
    if bias is not None and (bias.base is None or bias.base.shape != bias.model.shape):
        raise _unlike(bias)
    return LowRankModule(name, kind, model, base, parts)


def _unlike(pair: Pair) -> PlanError:
    there = "no such tensor" if pair.base is None else f"shape {list(pair.base.shape)}"
    return PlanError(
        f"{pair.model.file}, tensor {shown(pair.model.name)}: expected one of the base's shape, "
        f"found {list(pair.model.shape)} and {there} in the base; name the base that the model "
        "was trained from, or leave the module out (--exclude)"
    )


def _kind(model: Checkpoint, name: str) -> Kind:
    leaf = name.rpartition(".")[2]
    if _EMBEDDING.fullmatch(leaf):
        return "embedding"
    if (model.config or {}).get("model_type") in CONV1D_MODELS and leaf in CONV1D_LAYERS:
        return "conv1d"
    return "linear"


def _modules(base: Checkpoint, model: Checkpoint) -> dict[str, Parts]:
    """Modules by the names of the model's class: the longer of two names where one file lacks the
    first part."""
    prefix = MODEL_PREFIXES.get(str((model.config or {}).get("model_type")))
    both = (*model.tensors, *base.tensors)
    lacks = prefix is not None and not any(name.startswith(f"{prefix}.") for name in both)
    tails: dict[str, list[str]] = {}
    for name in base.tensors:
        tails.setdefault(name.partition(".")[2], []).append(name)
    modules: dict[str, Parts] = {}
    missing = dict(base.tensors)
    for name, entry in model.tensors.items():
        found = _counterpart(name, base, tails)
        there = None if found is None else missing.pop(found, None)
        module, _, part = max(name, found or "", key=len).rpartition(".")
        if lacks and module not in HEADS:
            module = f"{prefix}.{module}"
        modules.setdefault(module, {})[part] = Pair(entry, there)
    for name, entry in missing.items():
        module, _, part = name.rpartition(".")
        words = _words(model) if module.rpartition(".")[2] in HEADS else None
        if words is None or part != "weight":
            raise PlanError(
                f"model {model.reference}: expected all tensors of its base {base.reference}, "
                f"found no {shown(name)}; name the base that the model was trained from"
            )
        modules.setdefault(module, {})[part] = Pair(words, entry)
    return modules


def _words(model: Checkpoint) -> TensorEntry | None:
    """The embedding that is the model's head."""
    if not model.tied_embeddings:
        return None
    names = [name for name in model.tensors if name.split(".")[-2:][0] in _WORDS]
    return model.tensors[names[0]] if len(names) == 1 else None


def _counterpart(name: str, base: Checkpoint, tails: dict[str, list[str]]) -> str | None:
    """The base's name of a tensor: files may lack the first part of the names, or have one more."""
    if name in base.tensors:
        return name
    shorter = name.partition(".")[2]
    if "." in shorter and shorter in base.tensors:
        return shorter
    found = tails.get(name, [])
    return found[0] if len(found) == 1 else None


def _refuse_adapters(parts: Parts) -> None:
    for pair in parts.values():
        for entry in (pair.model, pair.base):
            if entry is not None and update_of(entry) is not None:
                raise PlanError(
                    f"tensor {shown(entry.name)}: expected weights as they lie in a file, found a "
                    "LoRA adapter on them; merge it into its base first (a recipe with "
                    "merge_method passthrough)"
                )
