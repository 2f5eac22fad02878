"""Plots as SVG text that takes its colours from the page, so that they follow light and dark.

Series differ by colour, dash and mark, and every mark says its value in a title, which browsers
show and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 920, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
#: Colours of the page's style; more series go on with other dashes.
NUM_COLOURS = 7
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MARK_RADIUS = 3
#: Lines of more points than this have no marks but on hovering.
MOST_MARKS = 300
LABEL_SPACE = 46
CELL_HEIGHT = 22
NAME_WIDTH = 270
NAME_CHARACTERS = 40


class Series(NamedTuple):
    """One line of a plot; values None leave a gap. ``number`` gives its colour and dash, which a
    model keeps from plot to plot."""

    label: str
    values: Sequence[float | None]
    number: int


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.4g}"


def line_plot(what: str, axis: str, places: Sequence[str], series: Sequence[Series]) -> str:
    """Lines over places in their order; ``what`` names the values, ``axis`` the places."""
    known = [value for each in series for value in each.values if value is not None]
    ticks = nice_ticks(min([0.0, *known]), max([0.0, *known]))
    low, high = ticks[0], ticks[-1]
    height, width = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT

    def x(index: int) -> float:
        return LEFT + (width / 2 if len(places) == 1 else width * index / (len(places) - 1))

    def y(value: float) -> float:
        return TOP + height * (high - value) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what)} by '
        f'{escape(axis)}">'
    ]
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" '
            f'y2="{y(tick):.1f}"/><text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{number(tick)}</text>'
        )
    step = max(1, math.ceil(len(places) * LABEL_SPACE / width))
    for index in range(0, len(places), step):
        parts.append(
            f'<text class="tick" x="{x(index):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{escape(_tail(places[index]))}</text>'
        )
    parts.append(
        f'<text class="axis" x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    for each in series:
        points = [(x(i), y(v), i, v) for i, v in enumerate(each.values) if v is not None]
        parts.append(f'<g class="series {_colour(each.number)}" data-series="{each.number}">')
        parts += [_path(run, each.number) for run in _runs(points)]
        few = " few" if len(places) * len(series) <= MOST_MARKS else ""
        parts += [
            f'<circle class="mark{few}" cx="{a:.1f}" cy="{b:.1f}" r="{MARK_RADIUS}"><title>'
            f"{escape(each.label)}, {escape(places[i])}: {number(v)}</title></circle>"
            for a, b, i, v in points
        ]
        parts.append("</g>")
    parts.append("</svg>")
    legend = "".join(
        f'<button type="button" class="key {_colour(each.number)}" data-series="{each.number}" '
        f'aria-pressed="true"><svg viewBox="0 0 28 10" aria-hidden="true">'
        f'<path d="M0 5H28"{_dash(each.number)}/></svg>{escape(each.label)}</button>'
        for each in series
    )
    return f'<div class="plot"><div class="legend">{legend}</div>{"".join(parts)}</div>'


Point = tuple[float, float, int, float]


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Points that follow one another without a gap."""
    runs: list[list[Point]] = []
    for point in points:
        if runs and runs[-1][-1][2] == point[2] - 1:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _path(run: Sequence[Point], number: int) -> str:
    steps = "L".join(f"{a:.1f} {b:.1f}" for a, b, _, _ in run)
    return f'<path d="M{steps}"{_dash(number)}/>'


def _colour(number: int) -> str:
    return f"s{number % NUM_COLOURS}"


def _dash(number: int) -> str:
    # Neighbours differ in more than their colour, and a colour that comes again has another dash.
    dash = DASHES[(number % NUM_COLOURS + number // NUM_COLOURS) % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that enclose the range, at least two."""
    if not high > low:
        high = low + 1.0
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def heatmap(
    what: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    top: float,
) -> str:
    """Cells of rows and columns, darker for more; ``top`` has the full colour."""
    width = WIDTH - NAME_WIDTH - RIGHT
    cell = min(60.0, width / max(1, len(columns)))
    height = TOP + len(rows) * CELL_HEIGHT + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(what)} by module and '
        f'layer">'
    ]
    for index, (row, cells) in enumerate(zip(rows, values, strict=True)):
        top_edge = TOP + index * CELL_HEIGHT
        parts.append(
            f'<text class="tick" x="{NAME_WIDTH - 8}" y="{top_edge + CELL_HEIGHT / 2 + 4}" '
            f'text-anchor="end">{escape(_short(row))}<title>{escape(row)}</title></text>'
        )
        for place, value in enumerate(cells):
            if value is None:
                continue
            share = min(1.0, value / top) if top > 0 else 0.0
            parts.append(
                f'<rect class="cell" x="{NAME_WIDTH + place * cell:.2f}" y="{top_edge}" '
                f'width="{cell:.2f}" height="{CELL_HEIGHT}" fill-opacity="{share:.3f}"><title>'
                f"{escape(row)}, {escape(columns[place])}: {value:.2%}</title></rect>"
            )
    step = max(1, math.ceil(LABEL_SPACE / cell))
    foot = TOP + len(rows) * CELL_HEIGHT
    for place in range(0, len(columns), step):
        parts.append(
            f'<text class="tick" x="{NAME_WIDTH + (place + 0.5) * cell:.1f}" y="{foot + 16}" '
            f'text-anchor="middle">{escape(_tail(columns[place]))}</text>'
        )
    middle = NAME_WIDTH + len(columns) * cell / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">layer</text>'
    )
    parts.append("</svg>")
    return (
        f'<div class="plot"><div class="legend scale"><span>0 %</span><span class="ramp"></span>'
        f"<span>{100 * top:.3g} %</span></div>{''.join(parts)}</div>"
    )


def _tail(place: str) -> str:
    """The number of a layer, or the end of another name."""
    last = place.rpartition(".")[2]
    return last if last.isdecimal() else place[-12:]


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else f"…{name[1 - NAME_CHARACTERS :]}"
