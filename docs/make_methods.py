"""Write docs/methods.md from the specifications of the merge methods.

Run it after a change in pymerge/methods: ``make docs``. A test compares.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pymerge.methods import METHODS
from pymerge.methods.protocol import Method
from pymerge.methods.spec import MethodSpec, ParameterSpec, value_text
from pymerge.ops.dispatch import BACKENDS
from pymerge.ops.table import OPS

PAGE = Path(__file__).with_name("methods.md")

INTRODUCTION = """\
# Merge methods

<!-- Made by docs/make_methods.py from the methods' own specifications; do not edit. -->

`pymerge methods` prints this list, `pymerge methods NAME` one method. [The recipe](recipe.md)
tells how parameters are set for single models, layers and tensors, [kernels](kernels.md) how the
arithmetic is done.

θ₀ is the base model, θᵢ the models in the order of the recipe, wᵢ their weights. Arithmetic is
float32 in that order, with one rounding at the end.
"""


#: What a method looks at before it merges, in words.
MEASURES = {
    "none": "nothing; one pass over the inputs",
    "row": "each row of a tensor",
    "tensor": "each tensor",
    "row or tensor": "each tensor, or each of its rows, as the parameters say",
    "model": "the whole model, in passes of their own before the merge",
    "tensor or model": "each tensor, or the whole model in passes of their own, as the parameters "
    "say",
}


def render() -> str:
    """The page."""
    methods = sorted(METHODS.values(), key=lambda entry: entry.spec.name)
    overview = table(
        ("method", "base model", "models", "what it does"),
        [
            (f"[`{spec.name}`](#{spec.name})", base_text(spec), spec.model_count, spec.summary)
            for spec in (method.spec for method in methods)
        ],
    )
    return "\n".join((INTRODUCTION, overview, *(section(method) for method in methods)))


def section(method: Method) -> str:
    """One method: formula, source, parameters."""
    spec = method.spec
    parts = [f"## {spec.name}", description(method)]
    if spec.paper:
        parts.append(f"Source: <{spec.paper}>")
    parts.append(f"Measures: {MEASURES[spec.statistics]}. Backends: {backends_text(method)}.")
    rows = [parameter_row(parameter) for parameter in spec.parameters.values()]
    head = ("parameter", "given", "values", "default", "meaning")
    parts.append(table(head, rows) if rows else "It has no parameters.")
    if spec.presets:
        parts.append(presets_table(spec))
    return "\n" + "\n\n".join(parts)


def backends_text(method: Method) -> str:
    """The backends that have every op of the method."""
    shared = [name for name in BACKENDS if all(name in OPS[op].backends for op in method.ops)]
    return ", ".join(f"`{name}`" for name in shared)


def presets_table(spec: MethodSpec) -> str:
    """What each preset gives the parameters that the recipe does not give."""
    rows = [
        (f"`{name}`", ", ".join(code(line) for line in lines) or "as above")
        for name, lines in spec.preset_lines().items()
    ]
    return table(("preset", "defaults"), rows)


def description(method: Method) -> str:
    """The docstring of the method's module, with Markdown's quotes and a line per paragraph
    or item of a list."""
    module = inspect.getmodule(method.merge)
    text = inspect.cleandoc((module and module.__doc__) or method.spec.summary)
    paragraphs = re.split(r"\n\s*\n", text.strip().replace("``", "`").replace(":func:", ""))
    lists = (re.split(r"\n(?=\d\. |- )", paragraph) for paragraph in paragraphs)
    return "\n\n".join("\n".join(" ".join(item.split()) for item in items) for items in lists)


def parameter_row(parameter: ParameterSpec) -> tuple[str, ...]:
    scope = "per model" if parameter.scope == "model" else "once"
    default = "required" if parameter.required else code(value_text(parameter.default))
    return (f"`{parameter.name}`", scope, values_text(parameter), default, parameter.doc)


def code(text: str) -> str:
    """Text in a cell of a table as it stands."""
    return f"`{text}`".replace("|", r"\|")


def values_text(parameter: ParameterSpec) -> str:
    if parameter.choices:
        return ", ".join(f"`{choice}`" for choice in parameter.choices)
    return f"{parameter.kind}, {parameter.bounds}" if parameter.bounds else parameter.kind


def base_text(spec: MethodSpec) -> str:
    return "one of the models" if spec.base == "input" else spec.base


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(render() + "\n", encoding="utf-8")
