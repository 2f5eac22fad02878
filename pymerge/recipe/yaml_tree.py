"""YAML text to plain data that remembers the line of everything.

Built from the parser's events rather than by ``yaml.safe_load``, for four reasons: duplicate keys
are errors here, keys stay the text that was written (``on:`` is not True), lines are kept for
messages, and reading does not recurse, so that hostile nesting and alias bombs end in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from pymerge.errors import RecipeError

Path = tuple[str | int, ...]

MAX_DEPTH = 64
MAX_INT = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str")}
_AS_TEXT_TAGS = {_TAG + kind for kind in ("timestamp", "value")}
_MERGE_TAG = _TAG + "merge"
_COLLECTION_TAGS = {None, "!", _TAG + "seq", _TAG + "map"}


@dataclass(frozen=True)
class Node:
    """A scalar, a list of nodes or a mapping of text to nodes.

    ``line`` counts from 1; for the value of a mapping it is the line of its key. ``height`` is 0
    for a scalar. Aliased nodes share their ``value``.
    """

    value: Any = field(repr=False)
    line: int
    height: int = 0

    def line_of(self, path: Path) -> int:
        """Line of the deepest node along ``path`` that exists."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                break
            node = child
        return node.line

    def prefix_of(self, path: Path) -> Path:
        """The leading part of ``path`` that exists."""
        node = self
        for depth, key in enumerate(path):
            child = node.child(key)
            if child is None:
                return path[:depth]
            node = child
        return path

    def child(self, key: str | int) -> Node | None:
        """The node under a key or at a position, or None."""
        child: Node | None = None
        if isinstance(self.value, dict) and isinstance(key, str):
            child = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            child = self.value[key]
        return child

    def data(self) -> Any:
        """The plain value; aliases share one object."""
        return _data(self, {})


def _data(node: Node, done: dict[int, Any]) -> Any:
    if not isinstance(node.value, (list, dict)):
        return node.value
    key = id(node.value)
    if key not in done:
        if isinstance(node.value, list):
            done[key] = [_data(child, done) for child in node.value]
        else:
            done[key] = {name: _data(child, done) for name, child in node.value.items()}
    return done[key]


@dataclass
class _Open:
    """A list or mapping that is being read; ``key`` waits for its value in a mapping."""

    line: int
    anchor: str | None
    is_mapping: bool
    items: list[Node]
    entries: dict[str, Node]
    merged: list[Node]
    key: str | None = None
    key_line: int = 0
    key_is_merge: bool = False


def parse_yaml(text: str) -> Node:
    """The one document in ``text``. Raises RecipeError with line and column."""
    with worded(text):
        loader = yaml.SafeLoader(text)
        try:
            return _compose(loader)
        finally:
            loader.dispose()


@contextmanager
def worded(text: str) -> Iterator[None]:
    """What the parser objects to in ``text`` becomes a RecipeError with line and column."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"not valid YAML{where}: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise RecipeError(
            f"not valid YAML at line {line}, column {column}: {error.reason}"
        ) from error
    except (ValueError, OverflowError) as error:
        # The scanner lets these out of escapes and directives with impossible numbers.
        raise RecipeError(f"not valid YAML: {error}") from error


def _compose(loader: yaml.SafeLoader) -> Node:
    anchors: dict[str, Node | None] = {}
    stack: list[_Open] = []
    root: Node | None = None
    num_documents = 0
    while True:
        event = loader.get_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        node: Node | None = None
        if isinstance(event, yaml.StreamEndEvent):
            break
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                raise RecipeError(
                    f"line {line}: a second YAML document begins here; this takes one "
                    "document; pymerge multi merges several that build on one another"
                )
        elif isinstance(event, yaml.CollectionStartEvent):
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            if event.tag not in _COLLECTION_TAGS:
                raise RecipeError(f"line {line}: the YAML tag {event.tag!r} is not supported")
            if stack and stack[-1].is_mapping and stack[-1].key is None:
                raise RecipeError(f"line {line}: a key must be plain text, not a list or mapping")
            if len(stack) >= MAX_DEPTH:
                raise RecipeError(f"line {line}: nested more than {MAX_DEPTH} levels deep")
            stack.append(_Open(line, event.anchor, is_mapping, [], {}, []))
            if event.anchor:
                anchors[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            opened = stack.pop()
            node = _close(opened)
            if opened.anchor:
                anchors[opened.anchor] = node
        elif isinstance(event, yaml.AliasEvent):
            node = _aliased(anchors, event.anchor, line)
        elif isinstance(event, yaml.ScalarEvent):
            if stack and stack[-1].is_mapping and stack[-1].key is None:
                _begin_entry(loader, stack[-1], event, line)
                if event.anchor:
                    anchors[event.anchor] = Node(event.value, line)
            else:
                node = Node(_scalar(loader, event, line), line)
                if event.anchor:
                    anchors[event.anchor] = node
        if node is None:
            continue
        if stack:
            _add(stack[-1], node)
        else:
            root = node
    if root is None:
        raise RecipeError("the recipe is empty; expected a mapping with merge_method and models")
    return root


def _aliased(anchors: dict[str, Node | None], name: str | None, line: int) -> Node:
    if name is None or name not in anchors:
        raise RecipeError(f"line {line}: the alias *{name} has no anchor &{name} before it")
    node = anchors[name]
    if node is None:
        raise RecipeError(f"line {line}: the alias *{name} stands inside its own anchor")
    return replace(node, line=line)


def _resolved_tag(loader: yaml.SafeLoader, event: yaml.ScalarEvent) -> str:
    tag: str = event.tag or "!"
    if tag == "!":
        tag = loader.resolve(  # type: ignore[no-untyped-call]
            yaml.ScalarNode, event.value, event.implicit
        )
    return tag


def _scalar(loader: yaml.SafeLoader, event: yaml.ScalarEvent, line: int) -> Any:
    tag = _resolved_tag(loader, event)
    if tag in _AS_TEXT_TAGS or tag == _MERGE_TAG:
        return event.value
    if tag not in _SCALAR_TAGS:
        raise RecipeError(f"line {line}: the YAML tag {tag!r} is not supported")
    try:
        value = loader.construct_object(yaml.ScalarNode(tag, event.value), deep=True)
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise OverflowError(f"beyond {MAX_INT}")
        return value
    except (ValueError, LookupError, ArithmeticError) as error:
        kind = tag.removeprefix(_TAG)
        raise RecipeError(
            f"line {line}: {event.value[:40]!r} reads as a YAML {kind} but is not a usable one; "
            "put quotes around it if it is text"
        ) from error


def _begin_entry(
    loader: yaml.SafeLoader, opened: _Open, event: yaml.ScalarEvent, line: int
) -> None:
    key = event.value
    if key in opened.entries:
        first = opened.entries[key].line
        raise RecipeError(
            f"line {line}: the key {key!r} stands twice in one mapping (first on line {first}); "
            "keep one of the two"
        )
    opened.key = key
    opened.key_line = line
    opened.key_is_merge = _resolved_tag(loader, event) == _MERGE_TAG


def _add(opened: _Open, node: Node) -> None:
    if not opened.is_mapping:
        opened.items.append(node)
        return
    if opened.key is None:
        raise RecipeError(f"line {node.line}: an alias cannot be a key; write the key out")
    if opened.key_is_merge:
        opened.merged.extend(_merge_sources(node))
    else:
        opened.entries[opened.key] = replace(node, line=opened.key_line)
    opened.key = None


def _merge_sources(node: Node) -> Sequence[Node]:
    nodes = node.value if isinstance(node.value, list) else [node]
    for source in nodes:
        if not isinstance(source.value, dict):
            raise RecipeError(f"line {source.line}: << takes a mapping or a list of mappings")
    return nodes


def _close(opened: _Open) -> Node:
    if not opened.is_mapping:
        value: Any = opened.items
        children: Sequence[Node] = opened.items
    else:
        for source in opened.merged:
            for key, node in source.value.items():
                opened.entries.setdefault(key, node)
        value = opened.entries
        children = list(opened.entries.values())
    height = 1 + max((child.height for child in children), default=0)
    if height > MAX_DEPTH:
        raise RecipeError(f"line {opened.line}: nested more than {MAX_DEPTH} levels deep")
    return Node(value, opened.line, height)
