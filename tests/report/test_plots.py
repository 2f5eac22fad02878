"""Properties of the plots that a browser does not tell."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from pymerge.report.plots import DASHES, NUM_COLOURS, Series, heatmap, line_plot, nice_ticks


def test_lines_differ_as_long_as_they_can():
    series = [Series(f"model {n}", [1.0, 2.0], n) for n in range(NUM_COLOURS * len(DASHES))]
    keys = re.findall(
        r'class="key (s\d)".*?<path d="M0 5H28"(.*?)/>', line_plot("x", "y", "ab", series)
    )
    assert len(set(keys)) == len(keys) == len(series)
    dashes = [dash for _, dash in keys]
    assert all(a != b for a, b in pairwise(dashes[:NUM_COLOURS]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.31, 0.77), (0, 1e-9), (0, 0), (-5e8, 3), (0.0, 99.99)]
)
def test_ticks_enclose_the_values_in_equal_steps(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(high - low)
    assert ticks[-1] >= high - 1e-9 * abs(high - low)
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))
    leading = steps[0] / 10.0 ** math.floor(math.log10(steps[0]))
    assert any(leading == pytest.approx(each) for each in (1, 2, 2.5, 5, 10))


def test_marks_stand_where_their_values_are():
    """Pixels are linear in the values: a half is halfway between zero and one."""
    page = line_plot("x", "y", ["a", "b", "c"], [Series("m", [0.0, 0.5, 1.0], 0)])
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', page)]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)
    assert heights[0] > heights[2]
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', page)]
    assert places[1] == pytest.approx((places[0] + places[2]) / 2, abs=0.1)


def test_what_is_missing_leaves_a_gap():
    page = line_plot("x", "y", list("abcde"), [Series("m", [1.0, 2.0, None, 3.0, 4.0], 0)])
    assert page.count("<circle") == 4
    line = page[page.index('<g class="series') :]
    assert line.count("<path") == 2


def test_cells_are_as_dark_as_their_share_of_the_largest():
    page = heatmap("x", ["r"], ["a.0", "a.1", "a.2"], [[0.1, None, 0.4]], top=0.4)
    assert re.findall(r'fill-opacity="([\d.]+)"', page) == ["0.250", "1.000"]
