"""The demo's table and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from pymerge.demo.optional import optional


@dataclass(frozen=True)
class Row:
    """Test accuracy of one configuration on every task, as fractions, in the order of the tasks."""

    name: str
    title: str
    accuracies: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.accuracies.values()) / len(self.accuracies)


def table(rows: Sequence[Row], bound: Row) -> Table:
    """Rows are methods, columns tasks; ``bound`` stands below a line, the best mean is bold."""
    shown = Table(title="Test accuracy in %", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("method", no_wrap=True)
    for task in bound.accuracies:
        shown.add_column(task, justify="right")
    shown.add_column("mean", justify="right")
    best = max(row.mean for row in rows)
    for row in rows:
        mean = f"{100 * row.mean:.1f}"
        cells = [f"{100 * accuracy:.1f}" for accuracy in row.accuracies.values()]
        last = row is rows[-1]
        shown.add_row(
            row.title,
            *cells,
            f"[bold]{mean}[/bold]" if row.mean == best else mean,
            end_section=last,
        )
    cells = [f"{100 * accuracy:.1f}" for accuracy in bound.accuracies.values()]
    shown.add_row(bound.title, *cells, f"{100 * bound.mean:.1f}")
    return shown


def plot(rows: Sequence[Row], bound: Row, path: Path) -> None:
    """A PNG: mean accuracy of every configuration as bars, accuracy on each task as dots."""
    optional("matplotlib").use("Agg")
    pyplot = optional("matplotlib.pyplot")
    tasks = list(bound.accuracies)
    shown = [*rows, bound]
    positions = list(range(len(shown)))[::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(shown) + 1.6), layout="constrained")
    colours = ["#9db8d6"] * len(rows) + ["#c9c9c9"]
    axes.barh(positions, [100 * row.mean for row in shown], color=colours, height=0.7)
    markers = pyplot.get_cmap("tab10")
    for number, task in enumerate(tasks):
        values = [100 * row.accuracies[task] for row in shown]
        axes.plot(values, positions, "o", ms=5, color=markers(number), label=task)
    for position, row in zip(positions, shown, strict=True):
        axes.text(101, position, f"{100 * row.mean:.1f}", va="center")
    axes.set_yticks(positions, [row.title for row in shown])
    axes.set_xlim(0, 107)
    axes.set_title("Eight fine-tuned models merged into one", loc="left")
    axes.set_xlabel("test accuracy in %: bars and figures are means, dots single tasks")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(tasks), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
