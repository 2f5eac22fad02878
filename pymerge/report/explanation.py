"""An explanation as text for a terminal and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pymerge.methods.spec import value_text
from pymerge.plan.explain import DEFAULT_ORIGIN, ExplainedTensor, ExplainedValue, Explanation
from pymerge.report.groups import Group, grouped
from pymerge.sizes import counted, format_size

if TYPE_CHECKING:
    from rich.console import Console

#: Lines of names that a group shows.
NAME_LINES = 6


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    return asdict(explanation)


def print_explanation(
    explanation: Explanation, console: Console, *, every_tensor: bool = False
) -> None:
    """Groups of equally treated tensors, or with ``every_tensor`` each by itself."""
    from rich.markup import escape

    num_tensors = _num_tensors(explanation.tensors)
    count = f"{counted(num_tensors, 'tensor')}"
    if num_tensors != explanation.num_tensors:
        count += f" of {explanation.num_tensors}"
    console.print(f"[bold]{explanation.method}[/]: {escape(explanation.summary)}")
    console.print(f"{count}, numerics {explanation.numerics}")
    groups = grouped(explanation.tensors)
    if every_tensor:
        groups = [Group((tensor,)) for tensor in explanation.tensors]
    for group in groups:
        console.print()
        _print_group(group, explanation, console)
    notes = {
        "decides nothing": explanation.unused,
        "without effect": explanation.without_effect,
    }
    if any(notes.values()):
        console.print()
    for title, sentences in notes.items():
        for sentence in sentences:
            console.print(f"[yellow]{title}:[/] {escape(sentence)}")


def _print_group(group: Group, explanation: Explanation, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    first, tensors = group.first, group.tensors
    names = group.names
    for name in names[:NAME_LINES]:
        console.print(f"[bold]{escape(name)}[/]")
    if len(names) > NAME_LINES:
        rest = counted(len(names) - NAME_LINES, "more line")
        console.print(f"… {rest} of names (--all lists every tensor)")
    how = f"merged by {explanation.method}" if first.kind == "merged" else first.note
    console.print(f"  {counted(_num_tensors(tensors), 'tensor')}: {escape(how)}; {_cost(tensors)}")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("  input", "tensor" if len(tensors) == 1 else "", "format", ""):
        table.add_column(column, overflow="fold")
    for each in first.inputs:
        where = f"{each.tensor} in {each.file}" if len(tensors) == 1 else ""
        role = " (base)" if each.role == "base" else ""
        table.add_row(f"  {escape(each.model)}{role}", escape(where), each.format, each.made)
    console.print(table)
    one = len(tensors) == 1
    rows = [row for row in _rows(group) if one or row[3] != DEFAULT_ORIGIN]
    if not one:
        _print_defaults(group, console)
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("  parameter", "of", "value", "from"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _num_tensors(tensors: Sequence[ExplainedTensor]) -> int:
    """Packed experts, each explained by itself, are one tensor."""
    return len({each.tensor for each in tensors})


def _print_defaults(group: Group, console: Console) -> None:
    """On one line what nobody gave."""
    from rich.markup import escape

    values = [each for each in group.first.values if each.origin == DEFAULT_ORIGIN]
    texts = dict.fromkeys(f"{each.name} {value_text(each.value)}" for each in values)
    if texts:
        console.print(f"  by default: {escape(', '.join(texts))}")


def _rows(group: Group) -> Iterator[tuple[str, str, str, str]]:
    first, one = group.first, len(group.tensors) == 1
    for index, value in enumerate(first.parameters):
        all_values = [tensor.parameters[index] for tensor in group.tensors]
        yield f"  {value.name}", "all", _text(all_values), _origin(value, one)
    for number, each in enumerate(first.inputs):
        for index, value in enumerate(each.parameters):
            all_values = [tensor.inputs[number].parameters[index] for tensor in group.tensors]
            yield f"  {value.name}", each.model, _text(all_values), _origin(value, one)


def _text(values: Sequence[ExplainedValue]) -> str:
    """The value, or the ends of what a gradient gives."""
    texts = {value_text(each.value) for each in values}
    if len(texts) == 1:
        return texts.pop()
    low, high = (pick(values, key=_number) for pick in (min, max))
    return f"{_short(low)} to {_short(high)}"


def _number(value: ExplainedValue) -> float:
    return float(value.value) if isinstance(value.value, int | float) else 0.0


def _short(value: ExplainedValue) -> str:
    return f"{value.value:.4g}" if isinstance(value.value, float) else value_text(value.value)


def _origin(value: ExplainedValue, one: bool) -> str:
    text = value.origin
    place = f" at t = {value.position:.4g}" if one and value.position is not None else ""
    if value.filter is not None:
        text += f", filter {value.filter!r}"
    if value.gradient:
        steps = ", ".join(value_text(each) for each in value.gradient)
        text += f", gradient [{steps}]{place}"
    return text


def _cost(tensors: Sequence[ExplainedTensor]) -> str:
    first = tensors[0]
    text = (
        f"reads {format_size(sum(each.bytes_read for each in tensors))}, writes "
        f"{format_size(sum(each.bytes_written for each in tensors))} of {first.format}"
    )
    looks = max(each.num_looks for each in tensors)
    if looks > 1:
        text += f", inputs read {looks:.3g} times"
    matrices = max(each.matrix_bytes for each in tensors)
    if matrices:
        flops = sum(each.flops for each in tensors)
        text += f", matrices of {format_size(matrices)}, {flops:.2g} flops"
    return text
