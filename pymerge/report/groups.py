"""Tensors that a recipe treats alike, and their names on a few lines."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from pymerge.plan.explain import ExplainedInput, ExplainedTensor, ExplainedValue


@dataclass(frozen=True)
class Group:
    """Tensors of equal settings, in the output's order."""

    tensors: tuple[ExplainedTensor, ...]

    @property
    def first(self) -> ExplainedTensor:
        return self.tensors[0]

    @property
    def names(self) -> list[str]:
        """The names with their numbers drawn together."""
        experts: dict[str, list[int]] = {}
        for each in self.tensors:
            number = each.name.removeprefix(each.tensor).strip("[]")
            experts.setdefault(each.tensor, []).extend([int(number)] if number else [])
        return drawn_together(
            [f"{name}[{ranges(found)}]" if found else name for name, found in experts.items()]
        )


def grouped(tensors: Iterable[ExplainedTensor]) -> list[Group]:
    """Groups of tensors whose settings are equal up to the position in a gradient."""
    found: dict[Hashable, list[ExplainedTensor]] = {}
    for tensor in tensors:
        inputs = tuple(map(_input_key, tensor.inputs))
        key = (tensor.kind, tensor.note, tensor.format, _keys(tensor.parameters), inputs)
        found.setdefault(key, []).append(tensor)
    return [Group(tuple(each)) for each in found.values()]


def _input_key(each: ExplainedInput) -> Hashable:
    return each.role, each.model, each.format, each.made, _keys(each.parameters)


def _keys(values: Sequence[ExplainedValue]) -> Hashable:
    return tuple(
        (each.name, each.origin, each.gradient or (type(each.value).__name__, each.value))
        for each in values
    )


def drawn_together(names: Sequence[str]) -> list[str]:
    """``layers.{0-31}.self_attn: q_proj.weight, k_proj.weight`` for names that differ in numbers
    and last parts only."""
    numbers: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        pattern = tuple("#" if part.isdecimal() else part for part in parts)
        numbers.setdefault(pattern, set()).add(tuple(int(p) for p in parts if p.isdecimal()))
    shared: dict[tuple[str, str], list[str]] = {}
    for pattern, found in numbers.items():
        if "#" not in pattern:
            shared.setdefault((".".join(pattern), ""), [])
            continue
        last = len(pattern) - 1 - pattern[::-1].index("#")
        head = _filled(pattern[: last + 1], found)
        shared.setdefault((head, "."), []).append(".".join(pattern[last + 1 :]))
    return [
        f"{head}: {', '.join(rests)}" if len(rests) > 1 else ".".join([head, *filter(None, rests)])
        for (head, _), rests in shared.items()
    ]


def _filled(pattern: Sequence[str], found: set[tuple[int, ...]]) -> str:
    """The pattern with the numbers that stand at each place."""
    columns = iter(zip(*sorted(found), strict=True))
    return ".".join(ranges(next(columns)) if part == "#" else part for part in pattern)


def ranges(numbers: Iterable[int]) -> str:
    """``3`` or ``{0-3,7}``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdecimal() else f"{{{text}}}"
