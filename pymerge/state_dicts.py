"""Merging the state dicts of torch models in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pymerge.in_memory.arguments import Settings
from pymerge.in_memory.driver import nonfinite
from pymerge.in_memory.items import Item, Whole
from pymerge.in_memory.planned import plan, sentence_of_nonfinite, warn
from pymerge.in_memory.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymerge.methods.numerics import Numerics

    StateDict = Mapping[str, torch.Tensor] | nn.Module


def merge_state_dicts(
    base: StateDict | None,
    models: Sequence[StateDict],
    *,
    method: str,
    out: StateDict | None = None,
    dtype: Any | None = None,
    out_dtype: Any | None = None,
    numerics: Numerics = "accurate",
    threads: int | None = None,
    backend: str | None = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> Any:
    """Merge models that a torch program holds; the result has the bytes of a merge of their files.

    :param method: name of a merge method, see ``pymerge methods``; one that makes a single dense
        model.
    :param base: the base model, or None where the method needs none. It says which tensors there
        are; without one the first model does. In methods that take the base as an input, such as
        linear, it is not one of them unless it is among ``models``. Models are mappings from names
        to torch tensors, all on the CPU or all on one GPU, or modules. A mapping may read from
        files: it is asked for a tensor when that is merged.
    :param models: the models in order; the order is part of the result.
    :param out: a mapping of tensors, or a module, that is written in place; its tensors keep their
        dtype and memory. It may be the base or one of the models.
    :param dtype: torch's name of the dtype that mergekit would compute in, and of the result's;
        default: the inputs' common dtype, else float32.
    :param out_dtype: the result's alone.
    :param numerics: ``accurate``, or ``mergekit`` to round every intermediate as mergekit does.
    :param threads: compute threads, 1 to 1024, default all CPUs available; the result does not
        depend on it.
    :param backend: ask for a backend by name; default: the first that can do every op.
    :param statistics: for a method that reads what was collected beside models: for each model a
        mapping from names to input Grams [inputs, inputs], or to Fisher diagonals of the tensors'
        shapes, float32.
    :param parameters: the method's parameters with the values that a recipe may give them; one of
        each model may be a number for all, a sequence or a tensor. Instead of its value each may be
        a function of the tensor's name, or a mapping from parts of names to values, of which the
        first that matches holds (``"*"`` matches every name).
    :returns: ``out``, or a new dict. Integers and booleans are the base's. A parameter that is tied
        in every model is merged once, under its first name, and stays tied.
    :raises RecipeError: a parameter is unknown, missing, or its value is not allowed.
    :raises PymergeError: the models do not fit together, or ``out`` does not fit them.
    """
    planned = plan(
        "merge_state_dicts",
        base,
        models,
        method=method,
        numerics=numerics,
        dtype=dtype,
        out_dtype=out_dtype,
        threads=threads,
        backend=backend,
        statistics=statistics,
    )
    with planned.driver() as driver:
        settings = Settings(planned.method.spec, parameters, len(models))
        targets = Targets(out, planned.dicts.entries, planned.caller)
        items: list[Item] = []
        for entry in planned.merged:
            tensor = planned.tensor(entry, settings, planned.format(entry, targets))
            hold = partial(planned.held, entry)
            whole = Whole(entry, planned.method, planned.dicts.device, targets, hold)
            items += whole.items(planned.pieces(tensor), entry.num_bytes)
        warn(planned.rehearse([item.tensor for item in items], settings))
        merged = [item for item in items if not planned.is_copy(item.entry, item.tensor)]
        written = driver.merge(merged)
    done = {item.entry.name for item in merged}
    for entry in planned.dicts.entries:
        if entry.name not in done:
            targets.copy(entry, planned.dicts.source_of_copy(entry))
    warn([f"{each.name}: {sentence}" for each in written for sentence in sorted(each.sentences)])
    warn(sentence_of_nonfinite(nonfinite(written)))
    if out is not None:
        return out
    return {name: targets.tensors[name] for name in planned.dicts.names}
