"""From state dicts and parameters to the tensors of a merge, as a plan makes them of files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pymerge.errors import PymergeError
from pymerge.formats import Format, promote
from pymerge.in_memory.arguments import Settings
from pymerge.in_memory.arrays import common_format, named_format, triangle
from pymerge.in_memory.driver import Driver
from pymerge.in_memory.items import Held
from pymerge.in_memory.models import Entry, StateDicts, sentence_of_dropped, sentences_of_others
from pymerge.in_memory.targets import Targets, settle
from pymerge.machine import compute_threads
from pymerge.methods.layout import unmatched
from pymerge.methods.numerics import Numerics, backend_in, method_in
from pymerge.methods.protocol import Method, Tensor
from pymerge.ops.executor import Executor, make_executor, make_resident_executor
from pymerge.ops.opset import choose_ops
from pymerge.sizes import counted

#: One mapping from names to statistics for each model.
Collected = Sequence[Mapping[str, Any]]
IsTransposed = Callable[[str], bool]


@dataclass(frozen=True)
class Statistics:
    """What was collected beside the models, by tensor.

    ``numbers`` is what goes with each model: 1 with a Gram, with a Fisher diagonal the norm of all
    of the model's.
    """

    kind: str = ""
    models: Collected = ()
    numbers: tuple[float, ...] = ()

    def numbers_of(self, name: str) -> tuple[float, ...]:
        """Those of a tensor; nothing was collected for some.

        :raises PymergeError: it was for some of the models only.
        """
        have = [index for index, model in enumerate(self.models) if name in model]
        if have and len(have) < len(self.models):
            missing = next(i for i in range(len(self.models)) if i not in have)
            raise PymergeError(
                f"tensor {name!r}: statistics were collected for models[{have[0]}] and not for "
                f"models[{missing}]; collect them for the same layers of every model"
            )
        return self.numbers if have else ()


def collected(method: Method, given: Collected | None, num_models: int, caller: str) -> Statistics:
    """The statistics of a call.

    :raises PymergeError: the method reads none, or others than are there.
    """
    reads = method.reads
    if not given and reads is None:
        return Statistics()
    what = "Gram matrices" if reads == "gram" else "Fisher diagonals"
    name = method.spec.name
    if reads is None:
        raise PymergeError(f"{caller}: {name} reads no statistics, found {len(given or ())}")
    if given is None or len(given) != num_models or isinstance(given, Mapping):
        found = "none" if not given else str(len(given))
        raise PymergeError(
            f"{caller}: {name} needs statistics=[...], for each of {num_models} models a mapping "
            f"from names to {what}; found {found}"
        )
    numbers = tuple(1.0 if reads == "gram" else _norm(model) for model in given)
    return Statistics(reads, tuple(given), numbers)


def _norm(diagonals: Mapping[str, Any]) -> float:
    squares = (np.square(_array(each), dtype=np.float64).sum() for each in diagonals.values())
    return math.sqrt(math.fsum(map(float, squares)))


def _array(given: Any) -> Any:
    """A numpy array of a torch tensor or an array."""
    return given.detach().cpu().numpy() if hasattr(given, "data_ptr") else np.asarray(given)


@dataclass
class Planned:
    """A merge of state dicts before its parameters are known."""

    caller: str
    method: Method
    dicts: StateDicts
    threads: int
    executor: Executor
    statistics: Statistics
    dtype: Format | None
    out_dtype: Format | None
    is_transposed: IsTransposed
    numerics: Numerics
    siblings: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def merged(self) -> list[Entry]:
        """The tensors that the method merges."""
        return [entry for entry in self.dicts.entries if entry.merged]

    def driver(self) -> Driver:
        """What merges; it ends the executor."""
        return Driver(self.method, self.executor, self.threads)

    def format(self, entry: Entry, targets: Targets) -> Format:
        """The format of a merged tensor.

        :raises PymergeError: ``out`` has it in another one than was asked for.
        """
        given = targets.format(entry.name)
        if given is not None and self.out_dtype is not None and self.out_dtype is not given:
            raise PymergeError(
                f"{self.caller}: out, tensor {entry.name!r} is {given.torch_name}, which it stays, "
                f"but out_dtype is {self.out_dtype.torch_name}; give one of both"
            )
        asked = given or self.out_dtype or self.dtype
        return common_format(entry.formats) if asked is None else asked

    def tensor(
        self,
        entry: Entry,
        settings: Settings,
        format: Format,
        memory: dict[Hashable, Any] | None = None,
    ) -> Tensor:
        """What the method knows of a tensor."""
        values = settings.of(entry.name)
        dicts, module = self.dicts, entry.name.rpartition(".")[0]
        return Tensor(
            name=entry.name,
            shape=entry.shape,
            num_models=dicts.num_models,
            has_base=dicts.has_base,
            parameters=values.shared,
            model_parameters=values.per_model,
            ops=self.executor.ops,
            model_names=dicts.labels,
            model_numbers=range(dicts.num_models),
            transposed=self.is_transposed(entry.name),
            statistics=self.statistics.numbers_of(entry.name),
            format=format,
            working=self.dtype or promote(entry.formats),
            siblings=self.siblings.get(module, {}),
            input_names=(entry.name,) * (dicts.num_models + int(dicts.has_base)),
            memory=memory,
        )

    def is_copy(self, entry: Entry, tensor: Tensor) -> bool:
        """Whether merging leaves every byte as it is."""
        return (
            self.method.spec.name == "passthrough"
            and tensor.model_parameters[0]["scale"] == 1.0
            and entry.formats[-1] == tensor.format == tensor.working
        )

    def pieces(
        self, tensor: Tensor, memory_of: Callable[[str], dict[Hashable, Any] | None] | None = None
    ) -> list[Tensor]:
        """The tensors that it is merged as: packed experts one by one, as a merge through files
        does; ``memory_of`` gives each what is remembered of it by its name."""
        from pymerge.plan.experts import differs_by_expert

        apart = (
            self.numerics == "accurate"
            and not (self.statistics.kind == "gram" and tensor.statistics)
            and differs_by_expert(self.method, tensor)
        )
        if not apart:
            return [tensor]
        count, *shape = tensor.shape
        names = [f"{tensor.name}[{number}]" for number in range(count)]
        return [
            replace(
                tensor,
                name=name,
                shape=tuple(shape),
                input_names=(name,) * len(tensor.input_names),
                memory=None if memory_of is None else memory_of(name),
            )
            for name in names
        ]

    def held(self, entry: Entry) -> Held:
        """The inputs of a tensor, read now."""
        base, models = self.dicts.read(entry.name)
        grams, diagonals = self._collected(entry, models[0])
        settle(self.dicts.device)
        return Held(base, models, diagonals, grams)

    def _collected(self, entry: Entry, pattern: Any) -> tuple[list[Any], list[Any]]:
        """The Grams' triangles or the diagonals of a tensor."""
        statistics = self.statistics
        if not statistics.numbers_of(entry.name):
            return [], []
        given = [_array(model[entry.name]) for model in statistics.models]
        labels = [
            f"{self.caller}: statistics[{index}], tensor {entry.name!r}"
            for index in range(len(given))
        ]
        if statistics.kind == "gram":
            return [triangle(*each) for each in zip(given, labels, strict=True)], []
        import torch

        for array, label in zip(given, labels, strict=True):
            if tuple(array.shape) != entry.shape:
                raise PymergeError(
                    f"{label} has shape {list(array.shape)}, expected {list(entry.shape)}"
                )
        flat = [np.ascontiguousarray(array, np.float32) for array in given]
        return [], [torch.from_numpy(array).to(pattern.device) for array in flat]

    def rehearse(self, tensors: Sequence[Tensor], settings: Settings) -> list[str]:
        """What the method has to say before anything is computed.

        :raises RecipeError: the parameters of a tensor do not work together.
        """
        for tensor in tensors:
            self.method.merge(tensor)  # a generator does not start before it is asked
        self.method.check(tensors)
        sentences = settings.unmatched([tensor.name for tensor in tensors])
        return sentences + unmatched(tensors) + self.method.warnings(tensors)


def plan(
    caller: str,
    base: Any | None,
    models: Sequence[Any],
    *,
    method: str,
    numerics: Numerics,
    dtype: Any | None,
    out_dtype: Any | None,
    threads: int | None,
    backend: str | None,
    statistics: Collected | None,
) -> Planned:
    """Look at every tensor and decide where it is merged; nothing is computed.

    :raises PymergeError: the state dicts do not fit together, or the method makes no dense model.
    """
    chosen = method_in(method, numerics)
    if chosen.extras:
        raise PymergeError(
            f"{caller}: {method} makes more than one model: merge its folders with pymerge.merge, "
            "or its tensors one by one with merge_tensor"
        )
    num_threads = compute_threads(threads)
    dicts = StateDicts(chosen.spec, base, models, caller)
    asked = backend_in(numerics, backend) if dicts.device == "cpu" else backend
    ops = choose_ops(dict.fromkeys((*chosen.ops, "convert")), asked=asked)
    executor = (
        make_executor(ops, num_threads)
        if dicts.device == "cpu"
        else make_resident_executor(ops, dicts.device)
    )
    siblings: dict[str, dict[str, tuple[int, ...]]] = {}
    for entry in dicts.entries:
        module, _, last = entry.name.rpartition(".")
        siblings.setdefault(module, {})[last] = entry.shape
    if dicts.dropped:
        warn([sentence_of_dropped(dicts.dropped, dicts.donor_label)])
    warn(sentences_of_others(dicts.entries, dicts.donor_label))
    return Planned(
        caller,
        chosen,
        dicts,
        num_threads,
        executor,
        collected(chosen, statistics, dicts.num_models, caller),
        None if dtype is None else named_format(dtype),
        None if out_dtype is None else named_format(out_dtype),
        transposed_in(models[0] if base is None else base),
        numerics,
        siblings,
    )


def transposed_in(model: Any) -> IsTransposed:
    """Which weights of a module are stored as [inputs, outputs], told by its configuration."""
    as_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if isinstance(model, Mapping) or as_dict is None:
        return lambda name: False
    from pymerge.plan.layers import is_transposed

    return partial(is_transposed, as_dict())


def warn(sentences: Sequence[str]) -> None:
    """Tell the caller of the public function."""
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=4)


def sentence_of_nonfinite(found: Mapping[str, int]) -> list[str]:
    """What is said of a result with non-finite elements."""
    if not found:
        return []
    names = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:5])
    return [
        f"{counted(len(found), 'tensor')} of the result have non-finite elements: {names}"
        f"{', …' if len(found) > 5 else ''}"
    ]
