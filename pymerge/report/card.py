"""README.md of a merged model: the card that the hub shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import yaml

from pymerge._version import __version__
from pymerge.methods.spec import MethodSpec
from pymerge.sizes import counted


@dataclass(frozen=True)
class CardModel:
    """One input: the reference as written, and its hub id (perhaps with revision) if it has one."""

    reference: str
    hub_id: str | None

    @property
    def repository(self) -> str | None:
        return self.hub_id.partition("@")[0] if self.hub_id else None


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
    beside: CardBeside | None = None,
) -> str:
    """The card's Markdown text. ``dtype`` names the format that most of the weights are stored in,
    ``beside`` is what the folder holds beside its model.

    Models without a hub id appear by their folder's name only, and never in the front matter.
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
    names = [f"- {number}: `{PurePath(name).name}`" for number, name in enumerate(beside.models)]
    return ["", f"## {beside.title}", "", beside.use, "", *names]


def _front_matter(inputs: Sequence[CardModel]) -> str:
    repositories = list(dict.fromkeys(model.repository for model in inputs if model.repository))
    fields: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "pymerge"]}
    if repositories:
        fields["base_model"] = repositories
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _link(paper: str) -> str:
    return f"<{paper}>" if paper.startswith("https://") else paper


def _display(model: CardModel) -> str:
    if model.repository:
        return f"[{model.hub_id}](https://huggingface.co/{model.repository})"
    return f"`{PurePath(model.reference).name}` (a local folder)"


def _fence(text: str) -> str:
    """A code fence longer than any run of backquotes in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
