"""Merges that build on one another: a recipe of several documents.

A document with a ``name`` is an input of those that use the name as a model. Where its method
computes each element from the same element of its inputs, its tiles are made while the document
that uses it reads them, and it is never written; every other one is merged into a folder first. The
bytes are the same either way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge import api
from pymerge.checkpoint import Checkpoint, open_checkpoint
from pymerge.errors import PymergeError, RecipeError, StorageError
from pymerge.names import listed, nearest

if TYPE_CHECKING:
    from pymerge.engine.run import MergeReport
    from pymerge.plan import Plan
    from pymerge.recipe import Recipe

#: Beside the output, for inputs that must be written; gone when the output is whole.
WORK_SUFFIX = ".intermediates"


@dataclass(frozen=True)
class MultiReport:
    """What became of each document, by its name, None for the one without: the report of its merge,
    or None where it was never written; and why those that were written had to be."""

    reports: Mapping[str | None, MergeReport | None]
    reasons: Mapping[str, str]


def merge_documents(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    intermediates: str | os.PathLike[str] | None = None,
    strict: bool = False,
    run: Mapping[str, Any] | None = None,
    **planning: Any,
) -> MultiReport:
    """Run all merges of a recipe with several documents.

    :param recipe: a YAML file, or the text.
    :param out: the folder of the document without a name; needed where there is one.
    :param intermediates: keep the output of every named document in a folder of its name in this
        one. Without it a named document is written only where another cannot do without, beside
        ``out``, and removed in the end.
    :param run: options of :func:`pymerge.merge` that do not belong to a plan.
    :param planning: options of :func:`pymerge.plan`, the same for each document.
    :raises RecipeError: a document is wrong, names clash, or documents use each other in a circle.

    Raises also what :func:`pymerge.merge` raises; what was finished before stays, and the same call
    continues.
    """
    text, file_name = _read(recipe)
    try:
        merges = _load(text, strict)
    except RecipeError as error:
        raise RecipeError(f"{file_name}: {error}" if file_name else str(error)) from error
    work = _Work(merges, None if out is None else Path(out), intermediates, planning, run or {})
    return work.run(_order(merges))


def _read(recipe: str | os.PathLike[str]) -> tuple[str, str | None]:
    if isinstance(recipe, str) and "\n" in recipe:
        return recipe, None
    try:
        return Path(recipe).read_text("utf-8-sig"), str(recipe)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {str(recipe)!r} cannot be read: {error}") from error


def _load(text: str, strict: bool) -> dict[str | None, Recipe]:
    from pymerge.recipe import split_documents

    return {
        document.name: api.load_recipe(document.text, strict=strict)
        for document in split_documents(text)
    }


def _order(merges: Mapping[str | None, Recipe]) -> list[str | None]:
    from pymerge.recipe import in_order

    return in_order({name: _used(recipe, merges) for name, recipe in merges.items()})


def _used(recipe: Recipe, merges: Mapping[str | None, Recipe]) -> list[str]:
    """The named documents that a recipe uses as models."""
    references = dict.fromkeys((*recipe.models, recipe.donor, recipe.tokenizer_donor))
    return list(dict.fromkeys(ref.path for ref in references if ref.path in merges))


class _Work:
    def __init__(
        self,
        merges: Mapping[str | None, Recipe],
        out: Path | None,
        intermediates: str | os.PathLike[str] | None,
        planning: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.merges, self.out = merges, out
        self.planning, self.options = planning, options
        self.kept = None if intermediates is None else Path(intermediates)
        self.uses = {name: _used(recipe, merges) for name, recipe in merges.items()}
        self.opened: dict[str, Checkpoint] = {}
        self.reasons: dict[str, str] = {}
        self._check()

    def _check(self) -> None:
        """What can be said before anything is merged."""
        if None in self.merges and self.out is None:
            raise PymergeError(
                "the document without a name needs a folder for its output, found none; name one "
                "as OUT"
            )
        if None not in self.merges and self.out is not None:
            raise PymergeError(
                "an output folder is given, and every document has a name; leave the name of the "
                "last one out, or give a folder for the intermediates alone"
            )
        used = {name for names in self.uses.values() for name in names}
        unused = [name for name in self.merges if name is not None and name not in used]
        if unused and self.kept is None:
            raise RecipeError(
                f"named documents that are used by no other: {listed(unused)}{self._near(unused)}; "
                "give a folder for the intermediates (-I) to have them written, or remove them"
            )

    def _near(self, unused: Sequence[str]) -> str:
        """The models that may be meant for documents, for a sentence."""
        models = {ref.path for recipe in self.merges.values() for ref in recipe.models}
        found = {path: nearest(path, unused) for path in sorted(models) if path not in self.merges}
        return "".join(
            f"; the model {path!r} resembles {near!r}"
            for path, near in found.items()
            if near is not None and not os.path.exists(path)
        )

    def run(self, order: Sequence[str | None]) -> MultiReport:
        reports: dict[str | None, MergeReport | None] = {}
        work = None if self.out is None else self.out.with_name(self.out.name + WORK_SUFFIX)
        for name in order:
            plan = api.plan(self.merges[name], opened=self.opened, **self.planning)
            if name is None:
                reports[name] = self._merge(plan, self.out)
            elif self.kept is not None:
                reports[name] = self._merge(plan, self.kept / name)
                self.opened[name] = self._open(name, self.kept / name)
            else:
                reports[name] = self._put(name, plan, work)
        if work is not None and self.kept is None:
            _remove(work, self.reasons)
        return MultiReport(reports, self.reasons)

    def _put(self, name: str, plan: Plan, work: Path | None) -> MergeReport | None:
        """Make a document's output something to read: as it is needed, or from a folder."""
        from pymerge.plan.merged import as_checkpoint

        reason = self._why_written(name, plan)
        if reason is None:
            self.opened[name] = as_checkpoint(plan, name)
            return None
        if work is None:
            raise RecipeError(
                f"the document {name!r} must be written ({reason}); give a folder for the "
                "intermediates"
            )
        self.reasons[name] = reason
        report = self._merge(plan, work / name)
        _date(plan, work / name)
        self.opened[name] = self._open(name, work / name)
        return report

    def _why_written(self, name: str, plan: Plan) -> str | None:
        from pymerge.plan.merged import why_written

        for user, recipe in self.merges.items():
            refs = [ref for ref in recipe.models if ref.path == name]
            if any(ref.adapter is not None for ref in refs):
                return f"an adapter is put on it in the document {user or 'without a name'}"
        return why_written(plan)

    def _merge(self, plan: Plan, folder: Path | None) -> MergeReport:
        if folder is None:
            raise PymergeError("no folder for the output")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return api.merge(plan, folder, **self.options)

    def _open(self, name: str, folder: Path) -> Checkpoint:
        return replace(open_checkpoint(str(folder)), reference=name)


def _date(plan: Plan, folder: Path) -> None:
    """Give the weights a time that says what they are: written anew they are the same input of the
    merges that use them, whose finished output is then known again."""
    time = int(plan.hash[:12], 16)
    try:
        for shard in plan.model_shards:
            os.utime(folder / shard.file_name, ns=(time, time))
    except OSError as error:
        raise StorageError(f"{folder}: the time of a file cannot be set: {error}") from error


def _remove(work: Path, names: Iterable[str]) -> None:
    """Remove what was written there, and the folder unless something else is in it."""
    try:
        for name in names:
            shutil.rmtree(work / name)
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    except OSError as error:
        raise StorageError(
            f"the output is whole, but the intermediates in {work} cannot be removed: {error}; "
            "remove the folder"
        ) from error
