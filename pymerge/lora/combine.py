"""Several LoRA adapters of one base made one: LoRA in, LoRA out, the base is not needed.

Module by module the factors are read, combined by one of the rules of
:mod:`pymerge.lora.factor_methods`, rounded once and written. Modules that only some adapters have
are combined of those.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pymerge.checkpoint import OutputTensor, TensorEntry
from pymerge.checkpoint.adapter import PREFIX
from pymerge.errors import PlanError, PymergeError
from pymerge.formats import Format, promote
from pymerge.lora import factor_methods as rules
from pymerge.lora.adapters import Adapters, Factors, formats_of, open_adapters
from pymerge.lora.config import adapter_config
from pymerge.lora.folder import AdapterFolder
from pymerge.lora.place import workspace
from pymerge.lora.read import (
    Bytes,
    check_unchanged,
    equal,
    mean,
    pieces,
    read_float32,
    refuse_non_finite,
    rounded,
)
from pymerge.lora.truncate import Truncation, checked, format_of, percent, rank_text
from pymerge.names import listed, nearest, shown
from pymerge.ops.workspace import Workspace
from pymerge.sizes import format_size

#: Modules whose factors are in memory at once, for each thread.
BATCH = 4


@dataclass(frozen=True)
class Rule:
    """What a way to combine asks for.

    ``equal_ranks``: the adapters' ranks of a module must be the same. ``truncates``: takes rank and
    energy. ``prunes``: takes density. ``weighted``: looks at weights and scales. ``adds``: what is
    linear in the updates, so that biases of B are combined, too.
    """

    summary: str
    equal_ranks: bool = False
    truncates: bool = False
    prunes: bool = False
    weighted: bool = True
    adds: bool = False


METHODS: Mapping[str, Rule] = {
    "svd": Rule("the truncated SVD of the sum of the updates", truncates=True, adds=True),
    "cat": Rule("the sum of the updates, exact, ranks added up", adds=True),
    "linear": Rule("sums of A and of B, as PEFT's linear", equal_ranks=True),
    "ties": Rule("TIES of A and of B, as PEFT's ties", equal_ranks=True, prunes=True),
    "magnitude_prune": Rule(
        "sums of pruned A and of pruned B, as PEFT's", equal_ranks=True, prunes=True
    ),
    "ties_svd": Rule("the truncated SVD of TIES of the updates", truncates=True, prunes=True),
    "magnitude_prune_svd": Rule(
        "the truncated SVD of the sum of the pruned updates", truncates=True, prunes=True
    ),
    "robust_merge": Rule("RobustMerge (CoPA-Merging) of A and B", equal_ranks=True, weighted=False),
}


@dataclass(frozen=True)
class CombinedModule:
    """One module of the result, its rank, and the share of the squared norm of what was to be
    written that a truncation left, before rounding; None where nothing is truncated."""

    name: str
    rank: int
    energy: float | None


@dataclass(frozen=True)
class CombineReport:
    """What was written; ``saved`` are tensors that are no factors, ``num_bytes`` the size of the
    weights file."""

    out: Path
    method: str
    modules: tuple[CombinedModule, ...]
    saved: tuple[str, ...]
    num_bytes: int

    @property
    def worst(self) -> CombinedModule | None:
        """The module of which a truncation left the smallest share."""
        cut = [module for module in self.modules if module.energy is not None]
        return min(cut, key=lambda module: module.energy or 0.0, default=None)

    def lines(self) -> list[str]:
        """The report in words."""
        ranks = sorted(module.rank for module in self.modules)
        found = [
            f"{self.out}: {self.method}, {len(ranks)} modules of {rank_text(ranks)}, "
            f"{format_size(self.num_bytes)}"
        ]
        worst = self.worst
        if worst is not None and worst.energy is not None:
            found.append(
                f"the factors of {worst.name} hold {percent(worst.energy)} of the sum (squared "
                "norm), those of all others as much or more"
            )
        if self.saved:
            found.append(f"saved whole: {', '.join(self.saved)}")
        return found


class _Made(NamedTuple):
    """A and B in the shapes and format of the file, the bias, and what the report says."""

    tensors: list[tuple[OutputTensor, Bytes]]
    rank: int
    energy: float | None


def combine_lora(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> CombineReport:
    """Combine LoRA adapters of one base into one adapter.

    An update is weight * scale * B A, with the adapter's own scale alpha / r or, for rsLoRA,
    alpha / sqrt(r). The result has alpha = r, so scale 1; robust_merge looks at no scale and keeps
    the adapters', which must be equal.

    :param adapters: folders of PEFT adapters or ids on the hub.
    :param out: output folder; it appears when it is whole.
    :param method: a key of ``METHODS``.
    :param weights: one for each adapter, 1 if not given; not for robust_merge.
    :param rank: for methods with svd: the largest rank; if neither it nor ``energy`` is given, the
        largest rank that an adapter has for the module.
    :param energy: for methods with svd: the share in (0, 1] of the squared norm of the sum that the
        rank must hold, at most ``rank``.
    :param density: for ties and magnitude_prune: the share of elements that is kept.
    :param dtype: of the factors: float32, float16 or bfloat16; default the adapters' own, float32
        where they differ.
    :param device: where to compute, by torch's name.
    :raises PymergeError: an argument is wrong.
    :raises BackendError: the device cannot be used.
    :raises CheckpointError: an adapter cannot be read, is no LoRA or is not finite.
    :raises PlanError: the adapters do not fit together or not the method; the output is taken.
    :raises StorageError: reading or writing failed.
    """
    names = [os.fspath(each) for each in adapters]
    rule = _check(method, names, weights, rank, energy, density)
    truncation = checked(rank, energy)
    for name in names:
        if os.path.exists(name) and os.path.realpath(name) == os.path.realpath(out):
            raise PlanError(f"output {os.fspath(out)}: it is one of the adapters; choose another")
    factors = [1.0] * len(names) if weights is None else [float(each) for each in weights]
    opened = open_adapters(names, allow_pickle=allow_pickle)
    _check_ranks(opened, method, rule)
    format = promote(formats_of(opened.modules.values())) if dtype is None else format_of(dtype)
    combine = _Combination(method, rule, truncation, factors, density or 1.0, format, opened)
    kept = {name: combine.other(name, group) for name, group in opened.others.items()}
    writer = AdapterFolder(
        Path(out),
        [*combine.largest(), *(tensor for tensor, _ in kept.values())],
        overwrite=overwrite,
    )
    found = []
    with workspace(threads, device) as ws, ws.active(), writer as folder:
        todo = list(opened.modules)
        for first in range(0, len(todo), BATCH * ws.threads):
            batch = todo[first : first + BATCH * ws.threads]
            for name, made in zip(batch, ws.map(partial(combine, ws), batch), strict=True):
                for tensor, data in made.tensors:
                    folder.put(tensor, [data])
                found.append(CombinedModule(name, made.rank, made.energy))
        for tensor, content in kept.values():
            folder.put(tensor, content)
        check_unchanged(adapter.header for adapter in opened.opened)
        num_bytes = folder.commit(combine.config({each.name: each.rank for each in found}))
    return CombineReport(Path(out), method, tuple(found), tuple(kept), num_bytes)


def _check(
    method: str,
    names: Sequence[str],
    weights: Sequence[float] | None,
    rank: int | None,
    energy: float | None,
    density: float | None,
) -> Rule:
    if method not in METHODS:
        match = nearest(method, METHODS)
        hint = f"; did you mean {match}?" if match else ""
        raise PymergeError(f"method: expected {listed(METHODS)}, found {shown(method)}{hint}")
    rule = METHODS[method]
    if not names:
        raise PymergeError("adapters: expected at least one, found none")
    if weights is not None and not rule.weighted:
        raise PymergeError(f"weights: expected none, as {method} weighs by itself; leave them out")
    if weights is not None and (
        len(weights) != len(names)
        or not all(isinstance(w, int | float) and np.isfinite(w) for w in weights)
    ):
        raise PymergeError(
            f"weights: expected {len(names)} numbers, one for each adapter, found {shown(weights)}"
        )
    if not rule.truncates and (rank is not None or energy is not None):
        able = listed(name for name, each in METHODS.items() if each.truncates)
        raise PymergeError(
            f"rank and energy: expected none, as {method} does not truncate; leave them out, or "
            f"choose {able}"
        )
    if (density is not None) != rule.prunes:
        wanted = "a share above 0 and at most 1" if rule.prunes else "none"
        raise PymergeError(f"density: expected {wanted} for {method}, found {shown(density)}")
    if density is not None and not (isinstance(density, int | float) and 0 < density <= 1):
        raise PymergeError(
            f"density: expected a share above 0 and at most 1, found {shown(density)}"
        )
    return rule


def _check_ranks(opened: Adapters, method: str, rule: Rule) -> None:
    for name, group in opened.modules.items():
        ranks = {each.rank for each in group}
        if rule.equal_ranks and len(ranks) > 1:
            raise PlanError(
                f"module {name}: expected one rank in all adapters, as {method} adds up their "
                f"factors, found {', '.join(map(str, sorted(ranks)))}; use svd or cat"
            )
        scales = {each.scale for each in group}
        if not rule.weighted and len(scales) > 1:
            raise PlanError(
                f"module {name}: expected one scale alpha / r in all adapters, as {method} does "
                f"not look at it, found {', '.join(map(str, sorted(scales)))}; use svd or linear"
            )
        if not rule.adds and any(each.bias is not None for each in group):
            raise PlanError(
                f"module {name}: expected no biases of lora_B, for which {method} has no rule, "
                "found some (lora_bias); use svd or cat"
            )


class _Combination:
    """One method on all modules."""

    def __init__(
        self,
        method: str,
        rule: Rule,
        truncation: Truncation,
        weights: Sequence[float],
        density: float,
        format: Format,
        opened: Adapters,
    ) -> None:
        self._method = method
        self._rule = rule
        self._truncation = truncation
        self._weights = weights
        self._density = density
        self._format = format
        self._opened = opened
        self._biased = any(each.bias for group in opened.modules.values() for each in group)
        if self._biased:
            self._check_biases()

    def __call__(self, ws: Workspace, name: str) -> _Made:
        group = self._opened.modules[name]
        updates = [self._low(each, ws) for each in group]
        made = self._combine(updates, group, ws)
        rank = made.a.shape[0]
        tensors = self._named(name, rank, group[0])
        arrays = [each.cpu().numpy() for each in (made.a, made.b)]
        if self._biased:
            tensors.append(self._bias(name, group[0]))
            arrays.append(self._bias_sum(group))
        data = [rounded(array, self._format, name) for array in arrays]
        return _Made(list(zip(tensors, data, strict=True)), rank, made.energy)

    def _combine(
        self, updates: Sequence[rules.Low], group: Sequence[Factors], ws: Workspace
    ) -> rules.Combined:
        if self._method == "svd":
            return rules.svd(updates, self._bounded(group), ws)
        if self._method == "cat":
            return rules.cat(updates)
        if self._method == "linear":
            return rules.linear(updates)
        if self._method == "robust_merge":
            return rules.robust_merge(updates)
        tensors = rules.ties if self._method.startswith("ties") else rules.magnitude_prune
        if self._rule.truncates:
            return rules.by_product(tensors, updates, self._density, self._bounded(group), ws)
        return rules.by_factor(tensors, updates, self._density)

    def _bounded(self, group: Sequence[Factors]) -> Truncation:
        chosen = self._truncation
        if chosen.rank is not None or chosen.energy is not None:
            return chosen
        return Truncation(max(each.rank for each in group))

    def _factor(self, each: Factors) -> float:
        return self._weights[each.adapter] * each.scale

    def _low(self, each: Factors, ws: Workspace) -> rules.Low:
        import torch

        a = torch.from_numpy(_read(each.a).reshape(each.rank, -1)).to(ws.device)
        b = torch.from_numpy(_read(each.b).reshape(-1, each.rank)).to(ws.device)
        return rules.Low(a, b, each.scale, self._weights[each.adapter])

    def largest(self) -> list[OutputTensor]:
        """The tensors of all modules in the largest shapes that they can have."""
        found = []
        for name, group in self._opened.modules.items():
            first = group[0]
            most = sum(each.rank for each in group)
            if self._method.endswith("_svd"):
                most = max(most, min(first.b.shape[0], first.a.num_elements // first.rank))
            found += self._named(name, most, first)
            if self._biased:
                found.append(self._bias(name, first))
        return found

    def _named(self, name: str, rank: int, first: Factors) -> list[OutputTensor]:
        kind, end = ("lora_embedding", "") if first.is_embedding else ("lora", ".weight")
        start = f"{PREFIX}{name}.{kind}"
        a, b = first.a.shape, first.b.shape
        return [
            OutputTensor(f"{start}_A{end}", self._format, (rank, *a[1:])),
            OutputTensor(f"{start}_B{end}", self._format, (b[0], rank, *b[2:])),
        ]

    def _bias(self, name: str, first: Factors) -> OutputTensor:
        return OutputTensor(f"{PREFIX}{name}.lora_B.bias", self._format, first.b.shape[:1])

    def _bias_sum(self, group: Sequence[Factors]) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = np.zeros(group[0].b.shape[0])
        for each in group:
            if each.bias is not None:
                found += self._factor(each) * _read(each.bias).astype(np.float64)
        return found

    def _check_biases(self) -> None:
        for name, group in self._opened.modules.items():
            if not any(each.bias for each in group):
                raise PlanError(
                    f"module {name}: expected a bias of lora_B as other modules have, found none; "
                    "PEFT gives all modules of an adapter such a bias, or none"
                )

    def other(
        self, name: str, group: Sequence[TensorEntry]
    ) -> tuple[OutputTensor, Iterable[Bytes]]:
        """A tensor that is no factor: the only one, or one of equals; robust_merge takes means."""
        first = group[0]
        if not all(equal(first, each) for each in group[1:]):
            if self._rule.weighted:
                raise PlanError(
                    f"tensor {name}: expected it in one adapter, or the same in all, found "
                    f"{len(group)} that differ; {self._method} combines factors alone: merge "
                    "base+adapter of each as whole models instead"
                )
            for each in group:
                if each.shape != first.shape or not each.format.is_float:
                    raise PlanError(
                        f"tensor {name}: expected floats of one shape in all adapters, found "
                        f"{each.format.name} {list(each.shape)} and {list(first.shape)}"
                    )
            format = promote(each.format for each in group)
            return OutputTensor(PREFIX + name, format, first.shape), _mean(group, format)
        return OutputTensor(PREFIX + name, first.format, first.shape), pieces(first)

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        opened = self._opened
        alphas = None
        if not self._rule.weighted:
            alphas = {name: _whole(opened.modules[name][0].scale * ranks[name]) for name in ranks}
        biases = any(not opened.are_saved(name) for name in opened.others)
        return adapter_config(
            base=opened.base,
            revision=opened.agreed("revision"),
            ranks=ranks,
            alphas=alphas,
            target_modules=opened.target_modules(),
            modules_to_save=opened.modules_to_save(),
            task_type=opened.agreed("task_type"),
            fan_in_fan_out=opened.opened[0].config.fan_in_fan_out,
            lora_bias=self._biased,
            bias="all" if biases else "none",
        )


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _read(entry: TensorEntry) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = read_float32(entry)
    refuse_non_finite(entry, values, "factors")
    return values


def _mean(group: Sequence[TensorEntry], format: Format) -> Iterator[Bytes]:
    yield mean(group, format)
