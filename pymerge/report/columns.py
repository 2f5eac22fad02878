"""The columns of a survey's tables: title, meaning and value of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pymerge.report.figures import Figures, Survey, TensorFigures

Value = str | float | int | None


@dataclass(frozen=True)
class Column:
    """``of(tensor)`` is a text, a number, or None where there is none."""

    title: str
    meaning: str
    of: Callable[[TensorFigures], Value]
    is_text: bool = False
    is_name: bool = False

    @staticmethod
    def text(value: float | int) -> str:
        """A count in full, a measure to four digits."""
        if isinstance(value, int):
            return f"{value:,}"
        return "0" if value == 0 else f"{value:.4g}"


def _number(title: str, meaning: str, of: Callable[[Figures], float | int | None]) -> Column:
    return Column(title, meaning, lambda t: None if t.figures is None else of(t.figures))


def columns_of(survey: Survey) -> list[Column]:
    """The columns that a survey has values for."""
    columns = [
        Column("tensor", "name in the output", lambda t: t.name, is_text=True, is_name=True),
        Column("shape", "", lambda t: " × ".join(map(str, t.shape)) or "scalar", is_text=True),
        Column("format", "of the output", lambda t: t.format, is_text=True),
        _number("elements", "in the output", lambda f: f.elements),
        _number("norm", "of the output", lambda f: f.norm),
    ]
    of_what = "weights"
    if survey.base is not None:
        of_what = "delta"
        columns += [
            _number("norm / base", "norm of the output over the base's", lambda f: f.norm_ratio),
            _number("cos base", "cosine of the output with the base", lambda f: f.base_cosine),
            _number("Δ norm", "norm of the output minus the base", lambda f: f.delta_norm),
        ]
    if survey.base is not None and survey.experts:
        columns.append(
            _number("Δ / experts", "its norm over the experts' mean", lambda f: f.delta_ratio)
        )
    for expert in survey.experts:
        label = survey.labels[expert]
        columns.append(_cosine(expert, f"cos {label}", f"cosine of the output's {of_what} with it"))
    if survey.base is not None:
        columns += [
            _number("conflicts", "share where experts' signs differ", lambda f: f.conflict_rate),
            _number("kept", "share that differs from the base", lambda f: f.kept_share),
        ]
    columns.append(_number("non-finite", "in the output", lambda f: f.nonfinite))
    return columns


def _cosine(expert: str, title: str, meaning: str) -> Column:
    return _number(title, meaning, lambda figures: figures.cosine(expert))
