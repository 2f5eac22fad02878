"""Recipes of several documents: each a merge of its own, the named ones inputs of the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pymerge.errors import RecipeError
from pymerge.names import shown
from pymerge.recipe.yaml_tree import parse_yaml, worded

_FOLDER_NAME = re.compile(r"[^/\\\0]{1,255}")


@dataclass(frozen=True)
class Document:
    """One merge of several. ``text`` is its YAML, behind as many empty lines as stand before it, so
    that its lines are those of the file; ``name`` is None for the one that the others lead to."""

    name: str | None
    text: str
    line: int


def split_documents(text: str) -> list[Document]:
    """The documents of a recipe in their order.

    Raises RecipeError where the text is no YAML, two documents have one name, a name cannot be that
    of a folder, or more than one document has none.
    """
    documents = [Document(_name(part, line), part, line) for part, line in _parts(text)]
    if not documents:
        raise RecipeError("the recipe is empty; expected a mapping with merge_method and models")
    places: dict[str | None, int] = {}
    for document in documents:
        if document.name in places:
            what = "no name" if document.name is None else f"the name {document.name!r}"
            raise RecipeError(
                f"lines {places[document.name]} and {document.line}: two documents have {what}; "
                "give each merge but the last a 'name' of its own, under which the others use it"
            )
        places[document.name] = document.line
    return documents


def _parts(text: str) -> Iterator[tuple[str, int]]:
    """Text and first line of each document."""
    start: Any = None
    with worded(text):
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            start = event.end_mark if event.explicit else event.start_mark
        elif isinstance(event, yaml.DocumentEndEvent) and start and event.end_mark:
            part = text[start.index : event.end_mark.index].removesuffix("...")
            if part.strip():
                yield "\n" * start.line + part, start.line + 1


def _name(text: str, line: int) -> str | None:
    raw = parse_yaml(text).data()
    name = raw.get("name") if isinstance(raw, Mapping) else None
    if name is None:
        return None
    if not isinstance(name, str) or name in (".", "..") or not _FOLDER_NAME.fullmatch(name):
        raise RecipeError(
            f"line {line}, name: expected a text that can be the name of a folder, found "
            f"{shown(name)}"
        )
    return name


def in_order(uses: Mapping[str | None, Sequence[str]]) -> list[str | None]:
    """The documents, each behind those that it uses, else in their order.

    ``uses`` are the names that each refers to. Raises RecipeError for a circle.
    """
    done: list[str | None] = []
    while len(done) < len(uses):
        ready = [
            name
            for name, used in uses.items()
            if name not in done and all(each in done for each in used)
        ]
        if not ready:
            raise RecipeError(
                f"the documents use each other in a circle: {' uses '.join(_circle(uses, done))}; "
                "remove one of these uses"
            )
        done.append(ready[0])
    return done


def _circle(uses: Mapping[str | None, Sequence[str]], done: Sequence[str | None]) -> list[str]:
    """Names of which each uses the next one, the first again as the last."""
    path: list[str] = []
    name = next(each for each in uses if each is not None and each not in done)
    while name not in path:
        path.append(name)
        name = next(each for each in uses[name] if each not in done)
    return [*path[path.index(name) :], name]
