"""One vocabulary for models that have different ones: which row of which model each token gets.

The rows of embeddings and heads are put in the order of the output's tokenizer. A token that a
model has keeps the model's row. One that it lacks gets, in this order: the row that the recipe
names for it; that of the only model which has it; the base's; the mean of the models' which have
it; zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import TensorEntry, nominal_format, update_of
from pymerge.checkpoint.rows import MEAN, PAD, ZERO, rows_tensor
from pymerge.checkpoint.tokenizer import Tokenizer
from pymerge.checkpoint.vocabulary import is_vocabulary
from pymerge.errors import PlanError
from pymerge.formats import F32, Format, promote
from pymerge.methods.numerics import Numerics
from pymerge.plan.outline import Input, Line
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.tokenizer import TokenRule

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows of the output and, for each model, its own id of each; -1 where it has no such
    token. ``own_ids`` are the ids that are tokens of the model. ``rules`` are those of the recipe
    with the row that each is for."""

    recipe: Recipe
    numerics: Numerics
    num_rows: int
    has_token: NDArray[np.bool_]
    tokenizer: Tokenizer
    maps: Mapping[ModelRef, Ids]
    own_ids: Mapping[ModelRef, Ids]
    tokenizers: Mapping[ModelRef, Tokenizer]
    rules: Sequence[tuple[int, TokenRule]] = ()
    warnings: list[str] = field(default_factory=list)

    def align(self, line: Line) -> Line:
        """The line with rows for this vocabulary; one that has no rows of tokens as it is.

        :raises PlanError: a rule of the recipe names a row that is not there, or an adapter is on
            a tensor whose rows change.
        """
        if not is_vocabulary(line.name):
            return line
        present = [each for each in line.inputs if each.entry is not None]
        if not present:
            donor = self.recipe.donor
            return replace(line, pattern=self._take(line.pattern, self._own(line.pattern, donor)))
        aligned = _Aligner(self, line, present).entries()
        inputs = tuple(
            each if each.entry is None else replace(each, entry=aligned[index])
            for each, index in zip(line.inputs, _positions(line.inputs), strict=True)
        )
        pattern = next(
            (a for i, a in zip(present, aligned, strict=True) if i.entry is line.pattern),
            aligned[0],
        )
        return replace(line, inputs=inputs, pattern=pattern)

    def _own(self, entry: TensorEntry, model: ModelRef) -> Ids:
        """The model's own row for each of the output's, -1 where it has none."""
        rows: Ids = self.maps[model].copy()
        rows[rows >= entry.shape[0]] = -1
        if self.numerics == "accurate":
            # A padded vocabulary stays as it is padded.
            spare = np.arange(min(self.num_rows, entry.shape[0]), dtype=np.int32)
            spare = spare[~self.has_token[: len(spare)] & ~np.isin(spare, self.own_ids[model])]
            rows[spare] = spare
        return rows

    def _take(self, entry: TensorEntry, rows: Ids) -> TensorEntry:
        """A tensor with some of its own rows alone, the rest their mean."""
        if np.array_equal(rows, np.arange(len(rows))):
            return first_rows(entry, len(rows))
        refuse_update(entry)
        origins = np.where(rows < 0, PAD, 0).astype(np.int16)
        means = np.empty((0, 1), np.int32)
        format, nominal = entry.format, nominal_format(entry)
        return rows_tensor(
            entry, (entry,), format, nominal, origins=origins, rows=rows, means=means
        )


def refuse_update(entry: TensorEntry) -> None:
    """:raises PlanError: an adapter is put on a tensor whose rows change."""
    if update_of(entry) is not None:
        raise PlanError(
            f"{entry.file}, tensor {entry.name!r}: an adapter is put on it, and its rows change "
            "with the vocabulary; merge the adapter into its base first, by passthrough"
        )


def first_rows(entry: TensorEntry, num: int) -> TensorEntry:
    """The first rows of a tensor. :raises PlanError: an adapter is put on it."""
    if num == entry.shape[0]:
        return entry
    refuse_update(entry)
    if type(entry) is TensorEntry:
        row_bytes = entry.num_bytes // entry.shape[0]
        return replace(entry, shape=(num, *entry.shape[1:]), num_bytes=num * row_bytes)
    return rows_tensor(
        entry,
        (entry,),
        entry.format,
        nominal_format(entry),
        origins=np.zeros(num, np.int16),
        rows=np.arange(num, dtype=np.int32),
        means=np.empty((0, 1), np.int32),
    )


def _positions(inputs: Sequence[Input]) -> list[int]:
    """The position of each input among those that have an entry."""
    found = np.cumsum([each.entry is not None for each in inputs]) - 1
    return [int(number) for number in found]


class _Aligner:
    """The rows of the inputs of one line."""

    def __init__(self, vocabulary: Vocabulary, line: Line, present: Sequence[Input]) -> None:
        self._vocabulary = vocabulary
        self._line = line
        self._models = [each.source.model for each in present]
        self._stored = [each.entry for each in present if each.entry is not None]
        self._own = np.stack(
            [
                vocabulary._own(entry, model)
                for entry, model in zip(self._stored, self._models, strict=True)
            ]
        )
        self._check_widths()

    def entries(self) -> list[TensorEntry]:
        origins, rows, means, forced = self._defaults()
        return [
            self._entry(number, origins, rows, means, forced) for number in range(len(self._stored))
        ]

    def _entry(
        self,
        number: int,
        origins: NDArray[np.int16],
        rows: Ids,
        means: Ids,
        forced: NDArray[np.bool_],
    ) -> TensorEntry:
        """One input with rows for the vocabulary."""
        entry, own = self._stored[number], self._own[number]
        keeps = (own >= 0) & ~forced
        chosen = np.where(keeps, number, origins).astype(np.int16)
        taken = np.where(keeps, own, rows).astype(np.int32)
        is_own = bool((chosen == number).all())
        if is_own and np.array_equal(taken, np.arange(len(taken))):
            return first_rows(entry, len(taken))
        stepwise = self._vocabulary.numerics == "mergekit"
        used = set(np.unique(chosen).tolist())
        if MEAN in used:
            table = means[np.unique(taken[chosen == MEAN])]
            used |= set(np.flatnonzero((table >= 0).any(axis=0)).tolist())
        sources = sorted(each for each in used if each >= 0) or [number]
        for each in sources:
            refuse_update(self._stored[each])
        place = np.full(len(self._stored), -1, np.int16)
        place[sources] = range(len(sources))
        stored = tuple(self._stored[each] for each in sources)
        chosen = np.where(chosen >= 0, place[np.maximum(chosen, 0)], chosen).astype(np.int16)
        return rows_tensor(
            entry,
            stored,
            self._format(stored),
            nominal_format(entry),
            origins=chosen,
            rows=taken,
            means=np.ascontiguousarray(means[:, sources]),
            stepwise=stepwise,
        )

    def _format(self, stored: Sequence[TensorEntry]) -> Format:
        recipe, numerics = self._vocabulary.recipe, self._vocabulary.numerics
        if numerics == "mergekit" and recipe.dtype is not None:
            return recipe.dtype
        format = promote({each.format for each in stored})
        return format if format.writable else F32

    def _defaults(self) -> tuple[NDArray[np.int16], Ids, Ids, NDArray[np.bool_]]:
        """For each row where models without it take it from: origins, rows and means as in
        ``RowsTensor``; and whether all models do."""
        vocabulary = self._vocabulary
        tokens = vocabulary.has_token
        has = (self._own >= 0) & tokens
        count = has.sum(axis=0)
        origins = np.where(tokens, ZERO, PAD).astype(np.int16)
        rows = np.zeros(len(tokens), np.int32)
        # Of one model that has it, or of several the base.
        one = count == 1
        base = self._line.slice.base or vocabulary.recipe.base_model
        first = has.argmax(axis=0)
        if base in self._models:
            of_base = has[self._models.index(base)] & (count > 1)
            first[of_base] = self._models.index(base)
            one |= of_base
        origins[one] = first[one]
        rows[one] = np.take_along_axis(self._own, first[None], axis=0)[0][one]
        averaged = np.flatnonzero((count > 1) & ~one & (count < len(self._models)))
        origins[averaged] = MEAN
        rows[averaged] = np.arange(len(averaged))
        means = np.where(has[:, averaged].T, self._own[:, averaged].T, -1).astype(np.int32)
        forced = np.zeros(len(tokens), np.bool_)
        for row, rule in vocabulary.rules:
            if rule.source is None or (not rule.force and count[row] == len(self._models)):
                continue
            origins[row], rows[row] = self._named(row, rule)
            forced[row] = rule.force
        self._warn_of_zeros(np.flatnonzero(tokens & (count == 0) & (origins == ZERO)))
        return origins, rows, means, forced

    def _named(self, row: int, rule: TokenRule) -> tuple[int, int]:
        """The origin and the row that a rule of the recipe names."""
        source = rule.source
        if source is None or source.model is None:
            return ZERO, 0
        if source.model not in self._models:
            raise PlanError(
                f"{rule.place}: the row of {rule.token!r} comes from {source.model}, which has no "
                f"part in tensor {self._line.name!r}; name a model that has one"
            )
        number = self._models.index(source.model)
        if source.token_id is not None:
            found = source.token_id
        elif source.token is not None:
            tokens = self._vocabulary.tokenizers[source.model].tokens
            if source.token not in tokens:
                raise PlanError(
                    f"{rule.place}: expected a token of {source.model}, found {source.token!r}, "
                    "which its tokenizer does not have; correct the token"
                )
            found = tokens[source.token]
        else:
            found = int(self._own[number, row])
            if found < 0:
                raise PlanError(
                    f"{rule.place}: the row of {rule.token!r} is to come from {source.model}, "
                    "whose tokenizer does not have the token; name another model, or another token "
                    f"of it by {{kind: model_token, model: {source.model}, token: ...}}"
                )
        num_rows = self._stored[number].shape[0]
        if found >= num_rows:
            raise PlanError(
                f"{rule.place}: expected an id below the {num_rows} rows of tensor "
                f"{self._line.name!r} of {source.model}, found {found}; name another token"
            )
        return number, found

    def _warn_of_zeros(self, rows: NDArray[np.int64]) -> None:
        named = {row for row, rule in self._vocabulary.rules if rule.source is not None}
        lost = [int(row) for row in rows if int(row) not in named]
        if not lost:
            return
        texts = self._vocabulary.tokenizer.texts
        first = ", ".join(repr(texts[row]) for row in lost[:5])
        self._vocabulary.warnings.append(
            f"tensor {self._line.name!r}: no model has a row for {len(lost)} of the tokens, theirs "
            f"are zeros: {first}{', …' if len(lost) > 5 else ''}"
        )

    def _check_widths(self) -> None:
        for entry, model in zip(self._stored, self._models, strict=True):
            if entry.shape[1:] != self._stored[0].shape[1:]:
                raise PlanError(
                    f"tensor {entry.name!r} of {model} has shape {list(entry.shape)}, that of "
                    f"{self._models[0]} {list(self._stored[0].shape)}; a common vocabulary changes "
                    "the number of rows alone: leave the model out"
                )
