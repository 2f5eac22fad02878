"""The output's tokenizer: which one the recipe asks for, its files, and the models' maps to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint import Checkpoint, TensorEntry, config_json, tokenizer_files
from pymerge.checkpoint.config import Config, read_json_object
from pymerge.checkpoint.new_tokenizer import extended, union, with_template
from pymerge.checkpoint.tokenizer import (
    PLAIN_FLAGS,
    Flags,
    Tokenizer,
    read_template,
    read_tokenizer,
)
from pymerge.checkpoint.vocabulary import (
    is_vocabulary,
    moved_token_ids,
    set_vocabulary_size,
    vocabulary_rows,
)
from pymerge.errors import PlanError
from pymerge.methods.numerics import Numerics
from pymerge.plan.outline import Line
from pymerge.plan.vocabulary import Vocabulary, first_rows
from pymerge.recipe import ModelRef, Recipe
from pymerge.recipe.tokenizer import TokenizerChoice

GENERATION_NAME = "generation_config.json"
Checkpoints = Mapping[ModelRef, Checkpoint]


@dataclass(frozen=True)
class OutputTokenizer:
    """What the recipe makes of the tokenizers.

    ``files`` are those that differ from the donors'. ``vocabulary`` is None where the models' rows
    stay as they are, and so is ``before``, the donor's tokenizer, where the ids do.
    """

    files: Mapping[str, bytes]
    vocabulary: Vocabulary | None
    before: Tokenizer | None
    warnings: Sequence[str] = ()

    def align(self, lines: Sequence[Line]) -> tuple[Line, ...]:
        """The lines with rows for the vocabulary. :raises PlanError: see ``Vocabulary.align``."""
        if self.vocabulary is None:
            return tuple(lines)
        return tuple(map(self.vocabulary.align, lines))

    def fit_config(self, config: Config) -> Config:
        """A configuration with the ids of the output's tokenizer."""
        if self.before is None or self.vocabulary is None:
            return config
        return moved_token_ids(config, self.before, self.vocabulary.tokenizer)[0]


def output_tokenizer(
    recipe: Recipe, checkpoints: Checkpoints, numerics: Numerics
) -> OutputTokenizer:
    """The tokenizer that the output gets.

    :raises CheckpointError: a tokenizer cannot be read, or nothing can be added to it.
    :raises PlanError: a model has none where the recipe needs one.
    """
    if recipe.tokenizer is None and recipe.chat_template is None:
        return OutputTokenizer({}, None, None)
    found = _read(recipe, checkpoints)
    donor = found[recipe.tokenizer_donor]
    if donor is None:
        raise PlanError(_without_files(recipe))
    files: dict[str, bytes] = {}
    vocabulary = before = None
    warnings: list[str] = []
    if recipe.tokenizer is not None:
        choice = recipe.tokenizer
        tokenizers = _assumed(recipe, found, warnings)
        made, files = _make(choice, recipe, donor, tokenizers, checkpoints, warnings)
        vocabulary = _vocabulary(recipe, made, tokenizers, checkpoints, numerics, warnings)
        own = found[recipe.donor]
        if own is not None and own is not donor:
            before = own
        donor = made
    template = _template(recipe, checkpoints, warnings)
    if template is not None:
        files = with_template(donor, files, template)
    if before is not None and vocabulary is not None:
        files |= _moved(before, vocabulary.tokenizer, checkpoints[recipe.donor], warnings)
    return OutputTokenizer(files, vocabulary, before, warnings)


def _read(recipe: Recipe, checkpoints: Checkpoints) -> dict[ModelRef, Tokenizer | None]:
    """Every model's tokenizer; those that the recipe does not need, for a template, are None."""
    wanted = dict.fromkeys((*recipe.models, recipe.donor, recipe.tokenizer_donor))
    by_folder: dict[Path, Tokenizer | None] = {}
    found: dict[ModelRef, Tokenizer | None] = {}
    for ref in wanted:
        folder = checkpoints[ref].folder
        needed = recipe.tokenizer is not None or ref == recipe.tokenizer_donor
        if folder is None or not needed:
            found[ref] = None
            continue
        if folder not in by_folder:
            tokenizer = read_tokenizer(folder)
            if tokenizer is not None and folder != checkpoints[recipe.tokenizer_donor].folder:
                tokenizer = replace(tokenizer, document=None)  # merges of pieces take most memory
            by_folder[folder] = tokenizer
        found[ref] = by_folder[folder]
    return found


def _without_files(recipe: Recipe) -> str:
    choice = recipe.tokenizer
    place = "chat_template" if choice is None else choice.place
    advice = (
        "name a model that has them, or leave the key out to take those of the base"
        if choice is not None and isinstance(choice.source, ModelRef)
        else "name a model that has them as tokenizer_source, or leave the key out"
    )
    return f"{place}: {recipe.tokenizer_donor} has no tokenizer files; {advice}"


def _assumed(
    recipe: Recipe, found: Mapping[ModelRef, Tokenizer | None], warnings: list[str]
) -> dict[ModelRef, Tokenizer]:
    """The models' tokenizers, the donor's for a model without one."""
    base = found[recipe.donor] or found[recipe.tokenizer_donor]
    tokenizers = {}
    for ref, tokenizer in found.items():
        if tokenizer is None and base is not None:
            warnings.append(
                f"{ref} has no tokenizer files: its vocabulary is taken to be that of "
                f"{recipe.donor if found[recipe.donor] else recipe.tokenizer_donor}"
            )
        each = tokenizer or base
        if each is not None:
            tokenizers[ref] = each
    return tokenizers


def _make(
    choice: TokenizerChoice,
    recipe: Recipe,
    donor: Tokenizer,
    tokenizers: Mapping[ModelRef, Tokenizer],
    checkpoints: Checkpoints,
    warnings: list[str],
) -> tuple[Tokenizer, dict[str, bytes]]:
    """The output's tokenizer and those of its files that are not the donor's."""
    additions: dict[str, Flags] = {}
    if choice.source == "union":
        order = dict.fromkeys((recipe.donor, *recipe.models))
        models = [(tokenizers[ref], _rows(checkpoints[ref])) for ref in order]
        additions, differing = union(donor, models)
        if differing:
            first = ", ".join(map(repr, differing[:5]))
            warnings.append(
                f"{choice.place}: {len(differing)} added tokens are defined in several ways; the "
                f"first holds: {first}{', …' if len(differing) > 5 else ''}"
            )
    known = donor.tokens.keys() | additions.keys()
    additions |= {rule.token: PLAIN_FLAGS for rule in choice.tokens if rule.token not in known}
    return extended(donor, additions)


def _rows(checkpoint: Checkpoint) -> int | None:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return vocabulary_rows(shapes, checkpoint.config)


def _vocabulary(
    recipe: Recipe,
    made: Tokenizer,
    tokenizers: Mapping[ModelRef, Tokenizer],
    checkpoints: Checkpoints,
    numerics: Numerics,
    warnings: list[str],
) -> Vocabulary:
    choice = recipe.tokenizer
    size = made.num_ids
    if numerics == "accurate":
        size = max(size, _rows(checkpoints[recipe.tokenizer_donor]) or 0)
    if choice is not None and choice.pad_to_multiple_of is not None:
        size = -(-size // choice.pad_to_multiple_of) * choice.pad_to_multiple_of
    ids = np.fromiter(made.tokens.values(), np.int32, len(made.tokens))
    has_token = np.zeros(size, np.bool_)
    has_token[ids] = True
    maps: dict[ModelRef, NDArray[np.int32]] = {}
    own_ids: dict[ModelRef, NDArray[np.int32]] = {}
    done: dict[int, ModelRef] = {}
    for ref, tokenizer in tokenizers.items():
        same = done.setdefault(id(tokenizer), ref)
        if same != ref:
            maps[ref], own_ids[ref] = maps[same], own_ids[same]
            continue
        own_ids[ref] = np.fromiter(tokenizer.tokens.values(), np.int32, len(tokenizer.tokens))
        maps[ref] = np.full(size, -1, np.int32)
        maps[ref][ids] = _ids_in(tokenizer, made)
    for ref, tokenizer in tokenizers.items():
        rows = _rows(checkpoints[ref])
        if rows is not None and tokenizer.num_ids > rows:
            warnings.append(
                f"{ref}: the ids of its tokenizer go up to {tokenizer.num_ids - 1}, its embedding "
                f"has {rows} rows; tokens beyond them count as missing in it"
            )
    rules = [(made.tokens[rule.token], rule) for rule in (choice.tokens if choice else ())]
    return Vocabulary(
        recipe, numerics, size, has_token, made, maps, own_ids, tokenizers, rules, warnings
    )


def _ids_in(tokenizer: Tokenizer, made: Tokenizer) -> NDArray[np.int32]:
    """The id in one tokenizer of each token of the other, -1 where it has no such token."""
    numbers = map(tokenizer.tokens.get, made.tokens, repeat(-1))
    return np.fromiter(numbers, np.int32, len(made.tokens))


def _template(recipe: Recipe, checkpoints: Checkpoints, warnings: list[str]) -> str | None:
    """The chat template of the output, None where the tokenizer's own stays."""
    if recipe.chat_template != "auto":
        return recipe.chat_template
    folders = [checkpoints[ref].folder for ref in recipe.models]
    found = [read_template(folder) for folder in folders if folder is not None]
    texts = [text.strip() for text in found if text and text.strip()]
    if not texts:
        warnings.append("chat_template: auto finds a template in no model; none is written")
        return None
    # Of equally frequent ones the first in the order of the recipe.
    return max(Counter(texts).items(), key=itemgetter(1))[0]


def _moved(
    before: Tokenizer, after: Tokenizer, donor: Checkpoint, warnings: list[str]
) -> dict[str, bytes]:
    """generation_config.json where its ids change; warns of tokens that are not in the output."""
    path = None if donor.folder is None else donor.folder / GENERATION_NAME
    config = None if path is None else read_json_object(path)
    files = {}
    for name, each in (("config.json", donor.config), (GENERATION_NAME, config)):
        if each is None:
            continue
        moved, lost = moved_token_ids(each, before, after)
        if lost:
            warnings.append(
                f"{name} of {donor.reference}: the output's tokenizer has no such token as "
                f"{', '.join(lost)}; the ids are left as they are: correct them"
            )
        if name == GENERATION_NAME and moved != config:
            files[name] = config_json(moved)
    return files


def check_files(recipe: Recipe, checkpoints: Checkpoints) -> None:
    """:raises PlanError: a model that the recipe names for its tokenizer has none."""
    choice = recipe.tokenizer
    if choice is None or not isinstance(choice.source, ModelRef):
        return
    if not tokenizer_files(checkpoints[choice.source]):
        raise PlanError(_without_files(recipe))


def truncated(lines: Sequence[Line], warnings: list[str]) -> tuple[Line, ...]:
    """The lines with the rows that all models have, for models whose tokens have the same ids."""
    found = []
    for line in lines:
        entries = [each.entry for each in line.inputs if each.entry is not None]
        sizes = {entry.shape[:1] for entry in entries}
        if not is_vocabulary(line.name) or len(sizes) < 2:
            found.append(line)
            continue
        (num,) = min(sizes)
        warnings.append(
            f"tensor {line.name!r} is cut to the first {num} rows, which all models have; the "
            "output is wrong unless their tokens have the same ids"
        )

        def cut(entry: TensorEntry, num: int = num) -> TensorEntry:
            return first_rows(entry, num)

        inputs = tuple(
            each if each.entry is None else replace(each, entry=cut(each.entry))
            for each in line.inputs
        )
        found.append(replace(line, inputs=inputs, pattern=cut(line.pattern)))
    return tuple(found)


def resized(config: Config, lines: Sequence[Line], donor: Checkpoint) -> Config:
    """A configuration whose size of the vocabulary is that of what is written, where the donor's
    rows are not."""
    rows = [
        line.pattern.shape[0]
        for line in lines
        if is_vocabulary(line.name)
        and (line.name not in donor.tensors or donor.tensors[line.name].shape != line.pattern.shape)
    ]
    if rows:
        set_vocabulary_size(config, max(rows))
    return config
