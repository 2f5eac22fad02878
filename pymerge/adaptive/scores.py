"""What is differentiated for a Fisher diagonal: log-likelihoods of labels, by estimator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pymerge.errors import PymergeError

if TYPE_CHECKING:
    import torch


def example_scores(
    estimator: str,
    logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    losses: torch.Tensor | None,
    real: torch.Tensor | None,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """Vectors [examples]; the sum over them of an example's squared gradients is its Fisher.

    exact: √p(c) log p(c) for every class c. monte_carlo: log p(c) of one label drawn from p, in a
    sequence one for each position. empirical: of the labels given, or the losses.
    """
    if losses is not None:
        _only_empirical(estimator, "losses")
        if logits is not None or labels is not None or losses.ndim != 1:
            raise PymergeError(
                "collect: expected losses [examples] alone, one for each example, found "
                f"{list(losses.shape)}{'' if logits is None else ' and logits'}; take the loss "
                "with reduction='none' and sum it over each example"
            )
        yield losses
        return
    log_p = _log_p(logits)
    if labels is not None:
        _only_empirical(estimator, "labels")
    if estimator == "exact":
        yield from _all_classes(log_p)
        return
    if estimator == "monte_carlo":
        import torch

        p = log_p.detach().exp().reshape(-1, log_p.shape[-1])
        labels = torch.multinomial(p, 1, generator=generator).reshape(log_p.shape[:-1])
    elif labels is None:
        raise PymergeError(
            "collect: expected labels or losses for the estimator empirical, found none; "
            "monte_carlo needs neither"
        )
    elif labels.shape != log_p.shape[:-1]:
        raise PymergeError(
            f"collect: expected one label for each row of logits, {list(log_p.shape[:-1])}, found "
            f"{list(labels.shape)}"
        )
    labels = labels.to(log_p.device)
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # Not a product: a padded position may hold NaN.
    chosen = chosen.masked_fill(~_counted(log_p, real) | (labels < 0), 0.0)
    yield chosen.reshape(len(chosen), -1).sum(1)


def batch_score(
    logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    losses: torch.Tensor | None,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """Σ √p(c) log p(c) over classes, positions and examples, as MergeLM and FusionBench have it.

    Its squared gradient is no Fisher diagonal: products between examples and classes stay in it,
    and it grows with the batch.
    """
    if losses is not None or labels is not None:
        _only_empirical("mergelm", "losses" if losses is not None else "labels")
    log_p = _log_p(logits)
    terms = (log_p.detach().exp().sqrt() * log_p).sum(-1)
    return terms.masked_fill(~_counted(log_p, real), 0.0).sum()


def _log_p(logits: torch.Tensor | None) -> torch.Tensor:
    import torch

    if logits is None or logits.ndim < 2:
        raise PymergeError(
            "collect: expected logits [examples, classes] or [examples, positions, classes], found "
            f"{'none' if logits is None else list(logits.shape)}"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1)


def _counted(log_p: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Which rows of the logits count."""
    import torch

    rows = log_p.shape[:-1]
    if real is None or len(rows) == 1:
        return torch.ones(rows, dtype=torch.bool, device=log_p.device)
    if real.shape != rows:
        raise PymergeError(
            f"collect: expected a mask for the positions of the logits {list(rows)}, found one of "
            f"{list(real.shape)}; give backward() theirs as mask"
        )
    return real.to(log_p.device)


def _all_classes(log_p: torch.Tensor) -> Iterator[torch.Tensor]:
    if log_p.ndim != 2:
        raise PymergeError(
            "collect: expected logits [examples, classes] for the estimator exact, found "
            f"{list(log_p.shape)}: it takes a backward pass for every class; monte_carlo takes one"
        )
    root = log_p.detach().exp().sqrt()
    for number in range(log_p.shape[1]):
        yield root[:, number] * log_p[:, number]


def _only_empirical(estimator: str, what: str) -> None:
    if estimator != "empirical":
        raise PymergeError(
            f"collect: expected logits alone for the estimator {estimator}, found {what}; they are "
            "for the estimator empirical"
        )
