"""A survey as tables for a terminal and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pymerge.report.figures import Figures, Survey, TensorFigures
from pymerge.report.plots import number
from pymerge.sizes import counted

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


def survey_data(survey: Survey) -> dict[str, Any]:
    """Everything, as JSON takes it: what is not a finite number is None."""
    return {
        "schema": SCHEMA,
        "out": survey.out,
        "method": survey.method,
        "base": survey.base,
        "experts": list(survey.experts),
        "warnings": list(survey.warnings),
        "overall": figures_data(survey, survey.overall),
        "layers": {name: figures_data(survey, each) for name, each in survey.layers.items()},
        "modules": {name: figures_data(survey, each) for name, each in survey.modules.items()},
        "tensors": [_tensor_data(survey, each) for each in survey.tensors],
    }


def _tensor_data(survey: Survey, tensor: TensorFigures) -> dict[str, Any]:
    place: dict[str, Any] = {
        "name": tensor.name,
        "layer": tensor.layer,
        "module": tensor.module,
        "shape": list(tensor.shape),
        "format": tensor.format,
    }
    return place if tensor.figures is None else place | figures_data(survey, tensor.figures)


def figures_data(survey: Survey, figures: Figures) -> dict[str, Any]:
    """The figures by the names of docs/report.md; experts by their full references."""
    experts = survey.experts
    between = [
        {"models": [left, right], "cosine": figures.products[left, right].cosine}
        for i, left in enumerate(experts)
        for right in experts[i + 1 :]
        if (left, right) in figures.products
    ]
    return {
        "tensors": figures.num_tensors,
        "elements": figures.elements,
        "norm": figures.norm,
        "norm_ratio": figures.norm_ratio,
        "base_cosine": figures.base_cosine,
        "delta_norm": figures.delta_norm,
        "delta_ratio": figures.delta_ratio,
        "expert_norms": {name: figures.expert_norm(name) for name in experts},
        "cosines": {name: figures.cosine(name) for name in experts},
        "between": between,
        "conflict_rate": figures.conflict_rate,
        "kept_share": figures.kept_share,
        "nonfinite": figures.nonfinite,
        "inputs_nonfinite": figures.inputs_nonfinite,
    }


def print_survey(survey: Survey, console: Console, *, every_tensor: bool = False) -> None:
    """The figures of the model, of its layers and of what stands outside them, or with
    ``every_tensor`` of each tensor."""
    from rich.markup import escape

    method = f" merged by {survey.method}" if survey.method else ""
    console.print(
        f"[bold]{escape(survey.out)}[/]{method}: {counted(len(survey.tensors), 'tensor')}, "
        f"{survey.overall.elements:,} parameters"
    )
    base = f"base {escape(survey.base)}" if survey.base else "no base, so that weights are compared"
    console.print(f"  {base}; {counted(len(survey.experts), 'model')} compared")
    if every_tensor:
        _print_table(survey, {t.name: t.figures for t in survey.measured if t.figures}, console)
        return
    rows: dict[str, Figures] = {"all": survey.overall}
    rows |= {name: figures for name, figures in survey.layers.items() if name}
    rows |= {t.name: t.figures for t in survey.measured if t.layer is None and t.figures}
    _print_table(survey, rows, console)


def _print_table(survey: Survey, rows: Mapping[str, Figures], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    titles = ["norm"]
    if survey.base is not None:
        titles += ["norm/base", "cos base", "Δ norm"]
        titles += ["Δ/experts"] if survey.experts else []
    titles += [f"cos {survey.labels[each]}" for each in survey.experts]
    titles += ["conflicts", "kept"] if survey.base is not None else []
    for title in [*titles, "non-finite"]:
        table.add_column(escape(title), justify="right")
    for name, figures in rows.items():
        table.add_row(escape(name), *_cells(survey, figures))
    console.print(table)


def _cells(survey: Survey, figures: Figures) -> list[str]:
    cells = [number(figures.norm)]
    if survey.base is not None:
        cells += [
            number(figures.norm_ratio),
            number(figures.base_cosine),
            number(figures.delta_norm),
        ]
        cells += [number(figures.delta_ratio)] if survey.experts else []
    cells += [number(figures.cosine(each)) for each in survey.experts]
    if survey.base is not None:
        cells += [_percent(figures.conflict_rate), _percent(figures.kept_share)]
    return [*cells, f"{figures.nonfinite:,}"]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
