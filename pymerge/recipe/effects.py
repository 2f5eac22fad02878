"""Settings of a document that change nothing, so that a user need not wonder what they do."""

from __future__ import annotations

from collections.abc import Iterator

from pymerge.recipe.findings import path_text
from pymerge.recipe.names import MERGEKIT_PARAMETERS, WITHOUT_EFFECT
from pymerge.recipe.recipe import Recipe
from pymerge.recipe.yaml_tree import Node, Path, parse_yaml

PARAMETERS_KEY = "parameters"


def without_effect(recipe: Recipe) -> list[str]:
    """A sentence for each parameter that the document gives and the recipe's method does not have,
    as far as it is one of the dialect."""
    root = parse_yaml(recipe.text)
    known = recipe.spec.parameters
    sentences = []
    for path in _parameters(root, ()):
        name = str(path[-1])
        place = f"{path_text(path)} (line {root.line_of(path)})"
        if name in known and known[name].ignored:
            sentences.append(f"{place}: {known[name].doc.rstrip('.')}")
        elif name in WITHOUT_EFFECT:
            sentences.append(
                f"{place}: {name} changes nothing in any method; mergekit stores its masks in 8 "
                "bits with it, pymerge keeps no masks in memory"
            )
        elif name in MERGEKIT_PARAMETERS and name not in known:
            sentences.append(f"{place}: {name} is no parameter of {recipe.method}")
    return sentences


def _parameters(node: Node, path: Path) -> Iterator[Path]:
    """The paths of everything that stands directly under a key ``parameters``."""
    children: list[tuple[str | int, Node]] = []
    if isinstance(node.value, dict):
        children = list(node.value.items())
    elif isinstance(node.value, list):
        children = list(enumerate(node.value))
    for key, child in children:
        if key == PARAMETERS_KEY and isinstance(child.value, dict):
            yield from ((*path, key, name) for name in child.value)
        else:
            yield from _parameters(child, (*path, key))
