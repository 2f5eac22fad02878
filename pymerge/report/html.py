"""A survey as one HTML page that needs nothing but itself.

Names are escaped wherever they stand, nothing of the survey is part of the script, and the page's
policy runs no other script and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePath

from pymerge.report.columns import Column, columns_of
from pymerge.report.figures import Figures, Survey
from pymerge.report.plots import Series, heatmap, line_plot, number
from pymerge.sizes import counted

#: Without layers the plots are over tensors, up to so many.
MOST_PLACES = 400
#: Modules that a heatmap shows.
MOST_MODULES = 60


def html_page(survey: Survey) -> str:
    """The whole page."""
    style, script = (_part(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    name = PurePath(survey.out).name or survey.out
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    body = "\n".join(_body(survey, name))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)}: merge report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _part(name: str) -> str:
    return files("pymerge.report").joinpath(name).read_text("utf-8")


def _body(survey: Survey, name: str) -> Iterator[str]:
    yield f"<h1>{escape(name)}</h1>"
    yield f'<p class="lead">{_summary(survey)}</p>'
    for sentence in survey.warnings:
        yield f'<p class="warning">{escape(sentence)}</p>'
    yield _tiles(survey.overall, survey)
    yield from _plots(survey)
    yield from _between(survey)
    yield from _table(survey)


def _summary(survey: Survey) -> str:
    overall = survey.overall
    method = f"Merged by <b>{escape(survey.method)}</b>. " if survey.method else ""
    experts = ", ".join(f"<code>{escape(survey.labels[each])}</code>" for each in survey.experts)
    base = f"base <code>{escape(survey.labels[survey.base])}</code>" if survey.base else "no base"
    return (
        f"{method}{counted(len(survey.tensors), 'tensor')}, {overall.elements:,} parameters; {base}"
        f"{f'; models {experts}' if experts else ''}."
    )


def _tiles(overall: Figures, survey: Survey) -> str:
    shares = {"kept": overall.kept_share, "conflict": overall.conflict_rate}
    kept, conflict = ("–" if share is None else f"{100 * share:.3g} %" for share in shares.values())
    tiles = [
        (number(overall.norm_ratio), "norm of the output over the base's"),
        (number(overall.base_cosine), "cosine of the output with the base"),
        (number(overall.delta_ratio), "norm of the delta over the experts' mean"),
        (kept, "of the elements differ from the base"),
        (conflict, "of the elements: experts disagree in sign"),
        (f"{overall.nonfinite:,}", "non-finite elements in the output"),
    ]
    if survey.base is None:
        tiles = [(number(overall.norm), "norm of the output"), tiles[-1]]
    cells = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cells}</div>'


def _places(survey: Survey) -> tuple[str, dict[str, Figures]]:
    """What the plots are over: layers, or tensors where there are no layers."""
    layers = {name: each for name, each in survey.layers.items() if name}
    if len(layers) > 1:
        return "layer", layers
    found = {each.name: each.figures for each in survey.measured if each.figures is not None}
    return "tensor", dict(list(found.items())[:MOST_PLACES])


def _plots(survey: Survey) -> Iterator[str]:
    axis, places = _places(survey)
    if not places:
        return
    names, figures = list(places), list(places.values())
    labels = survey.labels
    of_what = "delta" if survey.base else "weights"
    experts = [
        Series(labels[expert], [each.expert_norm(expert) for each in figures], number)
        for number, expert in enumerate(survey.experts, 1)
    ]
    output = [f.delta_norm if survey.base else f.norm for f in figures]
    yield f"<h2>Norms by {axis}</h2>"
    yield (
        '<p class="note">How far each model is from the base, and how far the output went.</p>'
        if survey.base
        else '<p class="note">Norms of the weights.</p>'
    )
    yield line_plot(f"norm of the {of_what}", axis, names, [Series("output", output, 0), *experts])
    if survey.experts:
        yield f"<h2>Cosines by {axis}</h2>"
        yield (
            f"<p class=\"note\">How much the output's {of_what} points where a model's does: 1 the "
            "same direction, 0 none in common. An expert that fades here was lost in the merge.</p>"
        )
        lines = [
            Series(labels[expert], [each.cosine(expert) for each in figures], number)
            for number, expert in enumerate(survey.experts, 1)
        ]
        yield line_plot("cosine", axis, names, lines)
    if axis == "layer" and survey.overall.contested:
        yield from _conflicts(survey, names)


def _conflicts(survey: Survey, layers: Sequence[str]) -> Iterator[str]:
    rates: dict[str, dict[str, float]] = {}
    from_many: dict[tuple[str, str], list[Figures]] = {}
    for tensor in survey.measured:
        if tensor.layer is not None and tensor.figures is not None:
            from_many.setdefault((tensor.module, tensor.layer), []).append(tensor.figures)
    for (module, layer), found in from_many.items():
        contested = sum(each.contested for each in found)
        if contested:
            rate = sum(each.conflicts for each in found) / contested
            rates.setdefault(module, {})[layer] = rate
    modules = list(rates)[:MOST_MODULES]
    values = [[rates[module].get(layer) for layer in layers] for module in modules]
    top = max((v for row in values for v in row if v is not None), default=0.0)
    yield "<h2>Sign conflicts by module and layer</h2>"
    yield (
        '<p class="note">Share of the elements where one expert moved up from the base and another '
        "down. The scale ends at the largest.</p>"
    )
    if len(rates) > MOST_MODULES:
        yield f'<p class="note">The first {MOST_MODULES} of {len(rates)} modules.</p>'
    yield heatmap("sign conflict rate", modules, layers, values, top=top)


def _between(survey: Survey) -> Iterator[str]:
    """How alike the experts are."""
    if len(survey.experts) < 2:
        return
    products = survey.overall.products
    heads = "".join(f"<th>{escape(survey.labels[each])}</th>" for each in survey.experts)
    rows = []
    for i, left in enumerate(survey.experts):
        cells = []
        for j, right in enumerate(survey.experts):
            pair = (left, right) if (left, right) in products else (right, left)
            found = products.get(pair)
            text = "1" if i == j else number(None if found is None else found.cosine)
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr><td>{escape(survey.labels[left])}</td>{''.join(cells)}</tr>")
    yield "<h2>Cosines between the models</h2>"
    of_what = "deltas to the base" if survey.base else "weights"
    yield f'<p class="note">Of their {of_what}, over all tensors.</p>'
    yield (
        f'<div class="frame small"><table><thead><tr><th></th>{heads}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


def _table(survey: Survey) -> Iterator[str]:
    columns = columns_of(survey)
    heads = "".join(_head(column) for column in columns)
    yield "<h2>Tensors</h2>"
    yield (
        '<div class="tools"><input id="filter" type="search" placeholder="Filter by parts of the '
        'name, as in: layers.3. mlp" aria-label="Filter tensors by parts of their names">'
        '<span id="shown" class="note" role="status"></span></div>'
    )
    yield f'<div class="frame"><table id="tensors"><thead><tr>{heads}</tr></thead><tbody>'
    for tensor in survey.tensors:
        bad = tensor.figures is not None and tensor.figures.nonfinite
        cells = "".join(_cells(columns, [column.of(tensor) for column in columns]))
        start = '<tr class="bad">' if bad else "<tr>"
        yield f"{start}{cells}</tr>"
    yield "</tbody></table></div>"


def _head(column: Column) -> str:
    kind = ' class="text"' if column.is_text else ""
    return (
        f'<th scope="col"{kind}><button type="button" title="{escape(column.meaning)}">'
        f"{escape(column.title)}</button></th>"
    )


def _cells(columns: Iterable[Column], values: Iterable[str | float | None]) -> Iterator[str]:
    for column, value in zip(columns, values, strict=True):
        if isinstance(value, str):
            text = f"<code>{escape(value)}</code>" if column.is_name else escape(value)
            yield f'<td class="text">{text}</td>'
        elif value is None:
            yield "<td>–</td>"
        else:
            yield f'<td data-value="{value!r}">{escape(column.text(value))}</td>'
