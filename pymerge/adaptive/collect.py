"""The entry to collecting statistics of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, overload

from pymerge.errors import PymergeError
from pymerge.names import shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymerge.adaptive.collect_fisher import FisherCollector
    from pymerge.adaptive.collect_gram import GramCollector


@overload
def collect(
    model: nn.Module,
    kind: Literal["gram"] = "gram",
    *,
    only: Iterable[str] | None = None,
    masks: bool = True,
    device: str | torch.device | None = None,
) -> GramCollector: ...


@overload
def collect(
    model: nn.Module,
    kind: Literal["fisher"],
    *,
    only: Iterable[str] | None = None,
    masks: bool = True,
    estimator: str = "monte_carlo",
    seed: int = 0,
) -> FisherCollector: ...


def collect(
    model: nn.Module,
    kind: str = "gram",
    *,
    only: Iterable[str] | None = None,
    masks: bool = True,
    device: str | torch.device | None = None,
    estimator: str | None = None,
    seed: int | None = None,
) -> GramCollector | FisherCollector:
    """Collect statistics of a torch module while you run your own batches through it::

        with pymerge.collect(model) as collector:
            for batch in batches:
                model(**batch)
        collector.save("llama-finance")

    The hooks are there within the block alone. Call the model itself, not its ``forward``.

    :param model: any torch module; of a model on disk the one that its weights' names are of.
    :param kind: ``"gram"``: the mean of xᵀx over the inputs x of every linear layer (``nn.Linear``
        and transformers' ``Conv1D``), for RegMean; needs forward passes, under ``torch.no_grad()``
        if you like. ``"fisher"``: the mean squared gradient of every parameter, for Fisher merging;
        call ``collector.backward(logits)`` after each call of the model.
    :param only: patterns (``*.layers.3.*``) of the weights to look at; default: all.
    :param masks: whether the ``attention_mask`` of the model's call says which tokens count;
        ``collector.mask()`` gives one for the next call in any case.
    :param device: of kind gram: where the sums are kept; default: where the inputs are.
    :param estimator: of kind fisher: ``"monte_carlo"`` (default; one label drawn for each example,
        unbiased), ``"exact"`` (all classes, a backward pass for each), ``"empirical"`` (the labels
        or losses given) or ``"mergelm"`` (squared gradients of whole batches, as other programs
        have it).
    :param seed: of the drawn labels, default 0.
    :raises PymergeError: an argument is none of these or not of this kind, or a pattern matches no
        weight.
    """
    if kind == "gram":
        if estimator is not None or seed is not None:
            raise PymergeError("collect: expected no estimator and no seed for the kind gram")
        from pymerge.adaptive.collect_gram import GramCollector

        return GramCollector(model, only=only, masks=masks, device=device)
    if kind == "fisher":
        if device is not None:
            raise PymergeError(
                "collect: expected no device for the kind fisher, whose sums are where the "
                "parameters are"
            )
        from pymerge.adaptive.collect_fisher import FisherCollector

        chosen = "monte_carlo" if estimator is None else estimator
        return FisherCollector(model, only=only, masks=masks, estimator=chosen, seed=seed or 0)
    raise PymergeError(f"collect: expected the kind gram or fisher, found {shown(kind)}")
