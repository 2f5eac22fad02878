"""README.md of a merged model: the card that the hub shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from urllib.parse import quote

import yaml

from pymerge._version import __version__
from pymerge.methods.spec import MethodSpec
from pymerge.sizes import counted

#: The usual names of the hub and values of a recipe need no escapes.
_PLAIN = re.compile(r"-?[A-Za-z0-9][\w ./@-]*", re.ASCII)


@dataclass(frozen=True)
class CardModel:
    """One input: the reference as written, its hub id (perhaps with revision) if it has one, and
    the license that its own card names, if it does."""

    reference: str
    hub_id: str | None
    license: str | None = None

    @property
    def repository(self) -> str | None:
        return self.hub_id.partition("@")[0] if self.hub_id else None


@dataclass(frozen=True)
class CardParameters:
    """The values of the parameters of one model, by its reference, or the shared ones where that is
    None; as a recipe writes them."""

    reference: str | None
    values: Mapping[str, str]


@dataclass(frozen=True)
class CardBeside:
    """What a folder holds beside its model: a heading, how it is used, and the models it is of, by
    their references."""

    title: str
    use: str
    models: Sequence[str]


def model_card(
    *,
    title: str,
    method: MethodSpec,
    models: Sequence[CardModel],
    base: CardModel | None,
    recipe: str,
    dtype: str,
    num_tensors: int,
    parameters: Sequence[CardParameters] = (),
    beside: CardBeside | None = None,
) -> str:
    """The card's Markdown text. ``dtype`` names the format that most of the weights are stored in,
    ``beside`` is what the folder holds beside its model.

    Models without a hub id appear by their folder's name only, and never in the front matter. A
    license stands there where the cards of all models name the same. Names cannot leave the place
    where they stand, whatever characters they have.
    """
    inputs = ([base] if base else []) + [model for model in models if model != base]
    lines = ["---", _front_matter(inputs).rstrip("\n"), "---", f"# {title}", ""]
    lines += [
        f"The weights of {counted(len(inputs), 'model')}, combined without training by the method "
        f"**{method.name}**: {method.summary.rstrip('.')}.",
        "",
    ]
    if method.paper:
        lines += [f"The method is described in {_link(method.paper)}.", ""]
    lines += ["## Merged models", ""]
    lines += [f"- {_display(model)}{' (base)' if model == base else ''}" for model in inputs]
    lines += _parameter_lines(parameters, inputs)
    lines += [] if beside is None else _beside_lines(beside)
    fence = _fence(recipe)
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe.rstrip("\n"), fence, ""]
    lines += [
        "## How it was made",
        "",
        f"pymerge {__version__} read the inputs' safetensors files and wrote {num_tensors} "
        f"tensors, most of the bytes in {dtype}. `pymerge_manifest.json` beside this file lists "
        "the inputs' headers and a checksum of every tensor; `pymerge verify FOLDER` compares "
        "them with the files.",
        "",
    ]
    return "\n".join(lines)


def _beside_lines(beside: CardBeside) -> list[str]:
    names = [f"- {number}: {_local(name)}" for number, name in enumerate(beside.models)]
    return ["", f"## {beside.title}", "", beside.use, "", *names]


def _front_matter(inputs: Sequence[CardModel]) -> str:
    repositories = list(dict.fromkeys(model.repository for model in inputs if model.repository))
    fields: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "pymerge"]}
    if repositories:
        fields["base_model"] = repositories
        fields["base_model_relation"] = "merge"
    licenses = {model.license for model in inputs}
    if len(licenses) == 1 and None not in licenses:
        fields["license"] = licenses.pop()
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _link(paper: str) -> str:
    return f"<{paper}>" if paper.startswith("https://") else paper


def _parameter_lines(
    parameters: Sequence[CardParameters], inputs: Sequence[CardModel]
) -> list[str]:
    """A table of each model's values, and one of those that hold for all."""
    shared = [each for each in parameters if each.reference is None and each.values]
    models = [each for each in parameters if each.reference is not None and each.values]
    if not shared and not models:
        return []
    lines = ["", "## Parameters", ""]
    named = {model.reference: model for model in inputs}
    names = list(dict.fromkeys(name for each in models for name in each.values))
    if models:
        lines += _row("model", *names) + _row(*["---"] * (len(names) + 1))
    for each in models:
        model = named.get(str(each.reference), CardModel(str(each.reference), None))
        who = _code(model.hub_id) if model.hub_id else _local(model.reference)
        lines += _row(who, *(_escaped(each.values.get(name, "")) for name in names))
    for each in shared:
        lines += [""] if models else []
        lines += _row("all models", "value") + _row("---", "---")
        for name, value in each.values.items():
            lines += _row(name, _escaped(value))
    return lines


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


def _display(model: CardModel) -> str:
    if model.repository:
        return f"[{_escaped(str(model.hub_id))}](https://huggingface.co/{quote(model.repository)})"
    return f"{_local(model.reference)} (a local folder)"


def _local(reference: str) -> str:
    """The name of a folder, without the way to it; of base+adapter the names of both."""
    return _code("+".join(PurePath(part).name or part for part in reference.split("+")))


def _code(text: str) -> str:
    """Text in code that it cannot end, on one line."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", plain)), default=0))
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def _escaped(text: str) -> str:
    """Text that is no markup, on one line."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    if _PLAIN.fullmatch(plain):
        return plain
    # A pipe is escaped by the table that it stands in; elsewhere it has no meaning.
    return re.sub(r"([!-/:-@\[-`{}~])", r"\\\1", plain)


def _fence(text: str) -> str:
    """A code fence longer than any run of backquotes in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
