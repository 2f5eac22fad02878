"""Parameter settings: scalar, gradient, conditional; checked once and then cheap to evaluate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from pymerge.errors import RecipeError
from pymerge.methods.spec import ParameterSpec, ParameterValue
from pymerge.methods.values import check_value
from pymerge.names import shown
from pymerge.recipe.findings import Findings
from pymerge.recipe.yaml_tree import Path

CONDITION_KEYS = ("filter", "value")


class Branch(NamedTuple):
    """One case of a setting: ``filter`` None holds for every tensor, else for names containing it.

    ``values`` is a gradient, a single value, or empty where the setting is unset for these tensors.
    ``origin`` and ``filter_origin`` are places in the document.
    """

    filter: str | None
    values: tuple[ParameterValue, ...]
    origin: str
    filter_origin: str


@dataclass(frozen=True)
class Setting:
    """What a document says of one parameter in one scope; the first matching branch holds."""

    spec: ParameterSpec
    branches: tuple[Branch, ...]


class Resolved(NamedTuple):
    """A value and the place in the document that it comes from, with the filter that the tensor's
    name passed and the gradient that was interpolated, where there is one."""

    value: ParameterValue
    origin: str
    filter: str | None = None
    gradient: tuple[ParameterValue, ...] = ()


def compile_setting(
    raw: Any, spec: ParameterSpec, path: Path, findings: Findings
) -> Setting | None:
    """Checks a setting against its spec; None where it is unset (an empty list) or wrong.

    Errors go to ``findings`` under ``path``.
    """
    num_errors = len(findings.errors)
    if isinstance(raw, dict):
        branches = [_condition(raw, spec, path, findings)]
    elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        branches = []
        for index, item in enumerate(raw):
            if isinstance(item, dict):
                branches.append(_condition(item, spec, (*path, index), findings))
            else:
                findings.error(
                    (*path, index),
                    f"expected {{filter, value}} like its neighbours, found {shown(item)}; "
                    "a list holds either values or conditions",
                )
        _warn_of_unreachable(branches, path, findings)
    else:
        branches = [_branch(None, raw, spec, path, path, findings)]
    if len(findings.errors) > num_errors or not any(branch.values for branch in branches):
        return None
    return Setting(spec, tuple(branches))


def _condition(raw: dict[str, Any], spec: ParameterSpec, path: Path, findings: Findings) -> Branch:
    for key in raw:
        if key not in CONDITION_KEYS:
            findings.unknown_key((*path, key), CONDITION_KEYS)
    text = raw.get("filter")
    # A number is a fair filter (a layer index); YAML's booleans are not what the user typed.
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if text is not None and not isinstance(text, str):
        findings.error(
            (*path, "filter"), f"expected a part of a tensor name, found {shown(text)}; quote it"
        )
        text = None
    if text in ("*", ""):
        text = None
    if "value" not in raw:
        findings.error(path, "a condition needs a 'value' beside its 'filter'")
        return Branch(text, (), findings.place(path), findings.place(path))
    return _branch(text, raw["value"], spec, (*path, "value"), (*path, "filter"), findings)


def _branch(
    text: str | None,
    raw: Any,
    spec: ParameterSpec,
    path: Path,
    filter_path: Path,
    findings: Findings,
) -> Branch:
    values: list[ParameterValue] = []
    if isinstance(raw, list):
        for index, item in enumerate(raw):
            value = _scalar(item, spec, (*path, index), findings)
            if value is not None:
                values.append(value)
    else:
        value = _scalar(raw, spec, path, findings)
        if value is not None:
            values.append(value)
    return Branch(text, tuple(values), findings.place(path), findings.place(filter_path))


def _warn_of_unreachable(branches: list[Branch], path: Path, findings: Findings) -> None:
    for index, branch in enumerate(branches[:-1]):
        if branch.filter is None:
            findings.warn(
                (*path, index + 1),
                "is never reached because the condition before it matches every tensor; put the "
                "condition without a filter last",
            )
            return


def _scalar(raw: Any, spec: ParameterSpec, path: Path, findings: Findings) -> ParameterValue | None:
    if raw is None:
        findings.error(path, f"{spec.name} has no value; give one or remove the key")
        return None
    try:
        return check_value(raw, spec)
    except ValueError as error:
        findings.error(path, f"{error}{_yaml_hint(raw, spec)}")
        return None


def _yaml_hint(raw: Any, spec: ParameterSpec) -> str:
    """What YAML may have made of a value that is of the wrong kind."""
    if spec.kind == "str" and not isinstance(raw, str):
        return "; put quotes around a word that YAML reads as a number or a boolean"
    if spec.kind in ("float", "int") and isinstance(raw, bool):
        return " (yes, no, on and off are YAML booleans)"
    return ""


def resolve(setting: Setting, tensor_name: str, t: float) -> Resolved | None:
    """The value for a tensor at gradient position ``t`` in [0, 1], or None where it is unset.

    Raises RecipeError where a gradient of whole numbers passes between two of them.
    """
    for branch in setting.branches:
        if branch.filter is None or branch.filter in tensor_name:
            if not branch.values:
                return None
            if len(branch.values) == 1:
                return Resolved(branch.values[0], branch.origin, branch.filter)
            value = _interpolate(setting.spec, branch, t)
            return Resolved(value, branch.origin, branch.filter, branch.values)
    return None


def _interpolate(spec: ParameterSpec, branch: Branch, t: float) -> ParameterValue:
    values = branch.values
    scaled = t * (len(values) - 1)
    index = math.floor(scaled)
    left, right = values[index], values[min(len(values) - 1, index + 1)]
    if isinstance(left, (bool, str)) or isinstance(right, (bool, str)) or left == right:
        return left
    share = scaled - index
    value = (1 - share) * left + share * right
    # Rounding may leave the interval by one unit in the last place, and with it the spec's range.
    value = min(max(value, min(left, right)), max(left, right))
    if spec.kind != "int":
        return value
    if not float(value).is_integer():
        raise RecipeError(
            f"{branch.origin}: the gradient of the whole number {spec.name} gives {value:g} at "
            f"position {t:g}; write {{filter, value}} conditions instead of a gradient"
        )
    return int(value)
