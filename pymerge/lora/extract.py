"""A LoRA adapter that turns a base into a model fine-tuned from it, as far as its rank goes.

The change of each linear layer is decomposed by a truncated SVD and written as two factors; what
has no factors (norms, and embeddings unless asked for) is written whole where it changed. After
mergekit's extract_lora, with the rank of each module chosen by its energy if wanted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pymerge.checkpoint import Checkpoint, OutputTensor, open_checkpoint
from pymerge.checkpoint.adapter import PREFIX
from pymerge.errors import PlanError, PymergeError
from pymerge.formats import Format
from pymerge.lora.biases import Biases
from pymerge.lora.config import adapter_config, target_names, task_type_of
from pymerge.lora.folder import AdapterFolder
from pymerge.lora.modules import (
    Choice,
    Division,
    LowRankModule,
    Pair,
    Parts,
    divide,
    head_of,
    refuse_unfit,
)
from pymerge.lora.place import workspace
from pymerge.lora.read import (
    Bytes,
    check_unchanged,
    difference,
    equal,
    pieces,
    refuse_non_finite,
    rounded,
)
from pymerge.lora.truncate import Truncation, checked, format_of, percent, rank_text
from pymerge.names import shown
from pymerge.ops.matrix.spectrum import truncated_svd
from pymerge.ops.workspace import Workspace
from pymerge.sizes import format_size

#: Largest rank unless another is given, mergekit's.
RANK = 128
#: Modules whose factors are in memory at once, for each thread.
BATCH = 4

Route = Literal["gram", "randomized"]


@dataclass(frozen=True)
class ModuleRank:
    """What one module became: its outputs and inputs, its rank, and the share of the squared norm
    of its change that the factors hold before they are rounded."""

    name: str
    num_out: int
    num_in: int
    rank: int
    energy: float


@dataclass(frozen=True)
class ExtractReport:
    """What was written.

    ``modules`` have factors, ``saved`` are whole, ``left_out`` were not asked for and not read;
    all others are as in the base. ``num_bytes`` is the size of the weights file.
    """

    out: Path
    modules: tuple[ModuleRank, ...]
    saved: tuple[str, ...]
    left_out: tuple[str, ...]
    num_bytes: int
    warnings: tuple[str, ...]

    @property
    def worst(self) -> ModuleRank:
        """The module of whose change the factors hold the smallest share."""
        return min(self.modules, key=lambda module: module.energy)

    def lines(self) -> list[str]:
        """The report in words."""
        ranks = sorted(module.rank for module in self.modules)
        worst = self.worst
        found = [f"warning: {warning}" for warning in self.warnings]
        found.append(
            f"{self.out}: {len(ranks)} modules of {rank_text(ranks)}, {format_size(self.num_bytes)}"
        )
        found.append(
            f"the factors of {worst.name} hold {percent(worst.energy)} of its change (squared "
            "norm), those of all others as much or more"
        )
        if self.saved:
            found.append(f"saved whole: {_first(self.saved)}")
        if self.left_out:
            found.append(f"left out: {_first(self.left_out)}")
        return found


def _first(names: Sequence[str], most: int = 20) -> str:
    """Names for a line of the report, and how many there are beyond."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Factors(NamedTuple):
    """A [rank, in] and B [out, rank] as bytes, and the share of the energy; rank 0 and zeros [1]
    for a module that did not change."""

    rank: int
    energy: float
    a: Bytes
    b: Bytes


def extract_lora(
    base: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = RANK,
    energy: float | None = None,
    epsilon: float = 0.0,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    embed: bool = False,
    save_modules: Iterable[str] = (),
    distribute_scale: bool = True,
    dtype: str = "float32",
    route: Route = "gram",
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the folder of a PEFT LoRA adapter that takes ``base`` near ``model``.

    :param base: folder, file or hub id of the model that the other was trained from.
    :param model: the fine-tuned model.
    :param out: output folder; it appears when it is whole.
    :param rank: largest rank of a module.
    :param energy: share in (0, 1] of the squared norm of a module's change: its rank is the
        smallest that holds it, at most ``rank``.
    :param epsilon: singular values at or below it are dropped.
    :param include: regular expressions; modules in whose names none is found are left out.
    :param exclude: regular expressions; modules in whose names one is found are left out.
    :param embed: decompose embeddings and the output head, too, which are else saved whole.
    :param save_modules: names or last parts of names of modules to save whole.
    :param distribute_scale: give each factor the roots of the singular values; else A takes them.
    :param dtype: of the factors: float32, float16 or bfloat16. What is whole keeps its format.
    :param route: gram is exact; randomized is near the best and cheaper for small ranks.
    :param device: where to decompose, by torch's name.
    :param progress: called with the number of modules decomposed and that of all.
    :raises PymergeError: an argument is wrong.
    :raises BackendError: the device cannot be used.
    :raises CheckpointError: a model cannot be read, or a change is not finite.
    :raises PlanError: the models do not fit together, a changed tensor has no place in an adapter,
        nothing changed, or the output is taken.
    :raises StorageError: reading or writing failed.
    """
    truncation, format = checked(rank, energy, epsilon, distribute_scale), format_of(dtype)
    if route not in ("gram", "randomized"):
        raise PymergeError(f"route: expected gram or randomized, found {shown(route)}")
    for name, value in (("include", include), ("exclude", exclude), ("save_modules", save_modules)):
        if isinstance(value, str):
            raise PymergeError(f"{name}: expected a list of texts, found one; write [{value!r}]")
    choice = Choice(
        _patterns("include", include), _patterns("exclude", exclude), embed, tuple(save_modules)
    )
    base, model = os.fspath(base), os.fspath(model)
    opened = _Models(
        open_checkpoint(base, allow_pickle=allow_pickle),
        open_checkpoint(model, allow_pickle=allow_pickle),
    )
    division = divide(opened.base, opened.model, choice)
    _keep_changed(division, opened.model)
    biases = Biases(division.low_rank)
    writer = AdapterFolder(
        Path(out), _largest(division, biases, truncation, format), overwrite=overwrite
    )
    with workspace(threads, device) as ws, ws.active(), writer as folder:
        found = _write_factors(folder, division, biases, truncation, format, route, ws, progress)
        chosen = [module for module in division.low_rank if module.name in found]
        _refuse_nothing(chosen, division, opened)
        for tensor, content in biases.tensors(chosen, format):
            folder.put(tensor, content)
        for name, parts in division.whole.items():
            for part, pair in parts.items():
                tensor = OutputTensor(f"{PREFIX}{name}.{part}", pair.model.format, pair.model.shape)
                folder.put(tensor, pieces(pair.model))
        check_unchanged((*opened.base.headers, *opened.model.headers))
        ranks = {name: each.rank for name, each in found.items()}
        num_bytes = folder.commit(_config(opened, chosen, ranks, division, biases))
    return ExtractReport(
        out=Path(out),
        modules=tuple(found.values()),
        saved=tuple(division.whole),
        left_out=tuple(division.left_out),
        num_bytes=num_bytes,
        warnings=(*opened.base.warnings, *opened.model.warnings, *division.warnings),
    )


class _Models(NamedTuple):
    base: Checkpoint
    model: Checkpoint


def _patterns(name: str, texts: Iterable[str]) -> list[re.Pattern[str]]:
    found = []
    for text in texts:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise PymergeError(
                f"{name}: expected regular expressions, found {text!r}: {error}; correct it"
            ) from None
    return found


def _keep_changed(division: Division, model: Checkpoint) -> None:
    """Drop from ``whole`` what is as in the base, and add what must go with the rest."""
    kept: dict[str, Parts] = {}
    rest: dict[str, Parts] = {**division.left_out}
    for name, parts in division.whole.items():
        if any(pair.base is None or not equal(pair.model, pair.base) for pair in parts.values()):
            refuse_unfit(name, parts)
            kept[name] = parts
        elif name in division.demanded:
            kept[name] = parts
        else:
            rest[name] = parts
    if division.tied in kept:
        head = head_of(model)
        if head is None:
            division.warnings.append(
                f"{division.tied} changed and is saved whole; a head that shares it keeps the "
                "base's weights in PEFT, unless the model is loaded with ensure_weight_tying"
            )
        else:
            kept[head] = kept[division.tied]
    division.whole = kept
    _keep_namesakes(division, rest)


def _keep_namesakes(division: Division, rest: dict[str, Parts]) -> None:
    """PEFT takes a name in modules_to_save for the end of any name, in the middle of a word, too,
    and asks for the tensors of all these modules."""

    def matches(name: str) -> bool:
        return any(name.endswith(saved) for saved in division.whole)

    while True:
        low_rank = [module for module in division.low_rank if matches(module.name)]
        names = [name for name in rest if matches(name)]
        if not low_rank and not names:
            return
        for module in low_rank:
            division.low_rank.remove(module)
            division.whole[module.name] = module.parts
        for name in names:
            parts = rest.pop(name)
            if division.left_out.pop(name, None) is not None:
                parts = {p: Pair(each.base or each.model, each.base) for p, each in parts.items()}
            refuse_unfit(name, parts)
            division.whole[name] = parts


def _largest(
    division: Division, biases: Biases, truncation: Truncation, format: Format
) -> list[OutputTensor]:
    """The tensors of the adapter in the largest shapes that they can have."""
    found = biases.largest(division.low_rank)
    for module in division.low_rank:
        rank = min(truncation.rank or min(module.shape), *module.shape)
        found += _named(module, rank, format)
    for name, parts in division.whole.items():
        for part, pair in parts.items():
            entry = pair.model
            found.append(OutputTensor(f"{PREFIX}{name}.{part}", entry.format, entry.shape))
    return found


def _named(module: LowRankModule, rank: int, format: Format) -> list[OutputTensor]:
    """A and B of a module."""
    start, end = f"{PREFIX}{module.name}.lora_", ".weight"
    if module.kind == "embedding":
        start, end = start + "embedding_", ""
    num_out, num_in = module.shape
    return [
        OutputTensor(f"{start}A{end}", format, (rank, num_in)),
        OutputTensor(f"{start}B{end}", format, (num_out, rank)),
    ]


def _write_factors(
    folder: AdapterFolder,
    division: Division,
    biases: Biases,
    truncation: Truncation,
    format: Format,
    route: Route,
    ws: Workspace,
    progress: Callable[[int, int], None] | None,
) -> dict[str, ModuleRank]:
    """Decompose and write the modules, some at a time, in the order of the checkpoint."""

    def factors(module: LowRankModule) -> _Factors:
        return _decompose(module, truncation, format, route, ws)

    found = {}
    modules = division.low_rank
    for first in range(0, len(modules), BATCH * ws.threads):
        batch = modules[first : first + BATCH * ws.threads]
        for module, made in zip(batch, ws.map(factors, batch), strict=True):
            # Without factors there is no place for the bias.
            if made.rank or module.name in biases.changed:
                rank = max(made.rank, 1)
                for tensor, data in zip(
                    _named(module, rank, format), (made.a, made.b), strict=True
                ):
                    folder.put(tensor, [data])
                found[module.name] = ModuleRank(module.name, *module.shape, rank, made.energy)
        if progress is not None:
            progress(first + len(batch), len(modules))
    return found


def _decompose(
    module: LowRankModule, truncation: Truncation, format: Format, route: Route, ws: Workspace
) -> _Factors:
    import torch

    delta = difference(module.weight, module.base)
    refuse_non_finite(module.weight, delta, "changes of weights")
    num_out, num_in = module.shape
    written = partial(rounded, format=format, name=module.name)
    most = min(truncation.rank or num_in, num_in, num_out)
    x = torch.from_numpy(delta).to(ws.device)
    del delta
    left, values, right, tail = truncated_svd(
        x if module.kind == "linear" else x.T, most, ws, route=route
    )
    keep, share = truncation.count(values, float(values.square().sum()) + tail)
    if not keep:
        zeros = np.zeros(max(num_in, num_out), np.float32)
        return _Factors(0, share, written(zeros[:num_in]), written(zeros[:num_out]))
    b, a = truncation.split(left[:, :keep], values[:keep], right[:keep])
    return _Factors(keep, share, written(a.cpu().numpy()), written(b.cpu().numpy()))


def _refuse_nothing(chosen: Sequence[LowRankModule], division: Division, opened: _Models) -> None:
    if chosen:
        return
    names = f"{opened.model.reference} and its base {opened.base.reference}"
    if division.whole:
        raise PlanError(
            f"{names}: expected linear layers that differ, found changes only in what is saved "
            f"whole ({', '.join(list(division.whole)[:5])}), and PEFT loads no LoRA without "
            "factors; decompose these (--embed), or include other modules"
        )
    raise PlanError(
        f"{names}: expected modules that differ, found none among those that are not left out; "
        "there is nothing to extract"
    )


def _config(
    opened: _Models,
    chosen: Sequence[LowRankModule],
    ranks: dict[str, int],
    division: Division,
    biases: Biases,
) -> dict[str, Any]:
    base = opened.base
    name, revision = base.reference, None
    if base.hub_id is not None and "@" in base.hub_id:
        name, _, revision = base.hub_id.partition("@")
    as_difference = biases.differences(chosen)
    return adapter_config(
        base=name,
        revision=revision,
        ranks=ranks,
        target_modules=target_names(ranks, division.tensors),
        modules_to_save=list(division.whole),
        task_type=task_type_of(opened.model),
        fan_in_fan_out=any(module.kind == "conv1d" for module in chosen),
        lora_bias=as_difference,
        bias="all" if biases.changed and not as_difference else "none",
    )
