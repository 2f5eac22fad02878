"""Embeddings arranged for one vocabulary, as mergekit's tokenizer step asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import TensorEntry, nominal_format
from pymerge.checkpoint.rows import MEAN, PAD, ZERO, rows_tensor
from pymerge.formats import F32, Format, promote
from pymerge.integrations.mergekit_inputs import LeftToMergekit

Ids = NDArray[np.int32]


def arranged(
    task: Any,
    info: Any,
    entries: Mapping[Any, TensorEntry],
    working: Format | None,
    *,
    stepwise: bool,
) -> dict[Any, TensorEntry]:
    """Model → its tensor [tokens, ...] with a row for each token of the output's vocabulary.

    A row that a model lacks is what the recipe or mergekit's rules choose for its token: that of
    another model, zeros, or the mean of those that have it.

    :param task: mergekit's PermutedVocabulary.
    :param info: the TokenizerInfo that mergekit built.
    :param stepwise: compute means as mergekit does.
    :raises LeftToMergekit: the rows lie along another axis, or a rule cannot be followed.
    """
    if task.vocabulary_axis != 0 or len({entry.shape[1:] for entry in entries.values()}) > 1:
        raise LeftToMergekit("vocabularies along another axis than the first")
    models = list(entries)
    vocab = info.tokenizer.get_vocab()
    num_tokens = len(vocab)
    if sorted(vocab.values()) != list(range(num_tokens)):
        raise LeftToMergekit("a tokenizer whose ids have gaps")
    own = np.stack([_own_rows(info.permutations[model], num_tokens) for model in models])
    defaults = _defaults(task, info, models, vocab, own)
    unit = task.pad_to_multiple_of or 1
    num_rows = -(-num_tokens // unit) * unit
    stored = tuple(entries.values())
    format = working if stepwise and working else promote({entry.format for entry in stored})
    format = format if format.writable else F32
    found: dict[Any, TensorEntry] = {}
    for number, model in enumerate(models):
        keeps = (own[number] >= 0) & ~defaults.forced
        origins = np.full(num_rows, PAD, np.int16)
        rows = np.zeros(num_rows, np.int32)
        origins[:num_tokens] = np.where(keeps, number, defaults.origins)
        rows[:num_tokens] = np.where(keeps, own[number], defaults.rows)
        for index in np.unique(origins[origins >= 0]):
            if rows[origins == index].max() >= stored[index].shape[0]:
                raise LeftToMergekit("tokens beyond the rows of their embedding")
        found[model] = rows_tensor(
            entries[model],
            stored,
            format,
            promote({nominal_format(entry) for entry in stored}),
            origins=origins,
            rows=rows,
            means=defaults.means,
            stepwise=stepwise,
        )
    return found


def _own_rows(permutation: Mapping[int, int], num_tokens: int) -> Ids:
    """A model's row for each token, -1 where it has none."""
    rows = (permutation[token] for token in range(num_tokens))
    return np.fromiter(rows, np.int32, num_tokens)


class _Defaults(NamedTuple):
    """What stands for a row that a model lacks, as in ``RowsTensor``; ``forced`` marks tokens whose
    own rows count for nothing."""

    origins: NDArray[np.int16]
    rows: Ids
    means: Ids
    forced: NDArray[np.bool_]


def _defaults(
    task: Any, info: Any, models: Sequence[Any], vocab: Mapping[str, int], own: Ids
) -> _Defaults:
    rules = dict(task.tokens or {})
    averaged = task.assign_embedding_sources(info.permutations, list(models), vocab, rules)
    origins = np.full(len(vocab), ZERO, np.int16)
    rows = np.zeros(len(vocab), np.int32)
    forced = np.zeros(len(vocab), bool)
    means: list[Ids] = []
    lacking: NDArray[np.bool_] = np.any(own < 0, axis=0)
    for token, number in vocab.items():
        rule = rules.get(token)
        forced[number] = rule is not None and rule.force
        if not (lacking[number] or forced[number]):
            continue
        if token in averaged:
            origins[number], rows[number] = MEAN, len(means)
            means.append(own[:, number])
        elif rule is not None:
            origins[number], rows[number] = _source(rule.source, info, models, own[:, number])
    table = np.stack(means) if means else np.empty((0, len(models)), np.int32)
    return _Defaults(origins, rows, np.ascontiguousarray(table), forced)


def _source(source: Any, info: Any, models: Sequence[Any], own: Ids) -> tuple[int, int]:
    """Which model's row a rule asks for, and which of them: (number of the model or ZERO, row)."""
    if getattr(source, "kind", None) == "zero":
        return ZERO, 0
    of_token = getattr(source, "kind", None) == "model_token"
    model = source.model if of_token else source
    if model not in models:
        raise LeftToMergekit("a token of a model that takes no part")
    number = models.index(model)
    row = int(own[number])
    if of_token:
        named = info.original_vocabs[model].get(source.token)
        row = source.token_id if source.token_id is not None else -1 if named is None else named
    if row < 0:
        raise LeftToMergekit("a token that the model named for it lacks")
    return number, row


def tokenizer_of(values: Iterator[tuple[Any, Any]] | Sequence[tuple[Any, Any]]) -> Any:
    """The TokenizerInfo among the values of mergekit's tasks, None where there is none."""
    return next((v for _, v in values if type(v).__name__ == "TokenizerInfo"), None)
