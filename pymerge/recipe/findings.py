"""What a check of a recipe found, with the place of each finding in the document."""

from __future__ import annotations

from collections.abc import Collection

from pymerge.errors import RecipeError
from pymerge.names import listed, nearest
from pymerge.recipe.yaml_tree import Node, Path


def path_text(path: Path) -> str:
    """``models[1].parameters.weight`` for ("models", 1, "parameters", "weight")."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key}" if text else key
    return text or "the top level"


class Findings:
    """Errors and warnings of one document, collected so that the user sees all of them at once.

    ``root`` gives lines and is None for a document that did not come from text; ``name`` is the
    file that it came from. With ``strict`` a warning is an error.
    """

    def __init__(
        self, root: Node | None = None, *, name: str | None = None, strict: bool = False
    ) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._root = root
        self._name = name
        self._strict = strict

    def place(self, path: Path) -> str:
        """The path and, where it is known, the line."""
        line = "" if self._root is None else f" (line {self._root.line_of(path)})"
        return path_text(path) + line

    def error(self, path: Path, sentence: str) -> None:
        self.errors.append(f"{self.place(path)}: {sentence}")

    def warn(self, path: Path, sentence: str) -> None:
        if self._strict:
            self.error(path, f"{sentence} (an error in strict mode)")
        else:
            self.warnings.append(f"{self.place(path)}: {sentence}")

    def unknown_key(
        self,
        path: Path,
        allowed: Collection[str],
        *,
        noun: str = "key",
        near: Collection[str] = (),
        belongs: str | None = None,
    ) -> None:
        """An error where the last part of ``path`` resembles a name or belongs elsewhere.

        ``near`` are names that are not allowed here but count for the resemblance; ``belongs`` says
        where the key would be right. A key that resembles nothing is a warning.
        """
        key = str(path[-1])
        match = nearest(key, allowed) or nearest(key, near)
        allowance = f"allowed here: {listed(allowed)}" if allowed else "nothing is allowed here"
        if belongs is not None:
            self.error(path, f"the {noun} {key!r} has no meaning here; {belongs}; {allowance}")
        elif match is not None:
            self.error(path, f"unknown {noun} {key!r}; did you mean {match!r}? {allowance}")
        else:
            self.warn(path, f"unknown {noun} {key!r} is ignored; {allowance}")

    def as_error(self) -> RecipeError:
        """One error that says everything found."""
        prefix = f"{self._name}: " if self._name else ""
        if len(self.errors) == 1:
            return RecipeError(prefix + self.errors[0])
        lines = "".join(f"\n  {error}" for error in self.errors)
        return RecipeError(f"{prefix}{len(self.errors)} errors in the recipe:{lines}")
