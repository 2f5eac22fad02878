"""How a method gets its second form, and what that form refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pymerge.errors import RecipeError
from pymerge.formats import BF16, F16, F32, F64, Format
from pymerge.methods.protocol import Apply, Cost, Measuring, Method, ModelMeasuring, Solving, Tensor
from pymerge.methods.registry import get_method
from pymerge.methods.spec import ParameterSpec
from pymerge.methods.stepwise.pieces import piece_cost
from pymerge.names import shown
from pymerge.ops import device

#: The formats that mergekit computes in here; with DOUBLE a method that needs no keys and no draws.
WORKING = (F32, F16, BF16)
DOUBLE = (*WORKING, F64)


def form(
    name: str,
    merge: Callable[[Tensor], Apply | Measuring | Solving],
    parameters: Sequence[str] = (),
    *,
    ops: tuple[str, ...] = (),
    looks: Callable[[Tensor], float] = lambda tensor: 0,
    cost: Callable[[Tensor], Cost] = piece_cost,
    check: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
    draws: Callable[[Tensor], bool] = lambda tensor: False,
    measure_model: Callable[[Sequence[Tensor]], ModelMeasuring] | None = None,
    more: Sequence[ParameterSpec] = (),
    working: Sequence[Format] = WORKING,
) -> Method:
    """The form of the method ``name`` that rounds every step.

    :param parameters: those that mergekit has; others must be left at their defaults.
    :param draws: whether a tensor takes random numbers, which ``measure_model`` deals out.
    :param more: parameters beside those of the accurate form.
    :param working: the formats that it computes in.
    """
    accurate = get_method(name)
    spec = accurate.spec
    if more:
        known = {**spec.parameters, **{each.name: each for each in more}}
        spec = replace(spec, parameters=known)
    known_here = {*parameters, *(each.name for each in more)}

    def check_all(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            _check_format(tensor, working)
            _check(tensor, spec.parameters.values(), known_here, name)
        check(tensors)

    return Method(
        spec,
        merge,
        ("convert", *ops),
        looks=looks,
        model_wide=draws,
        measure_model=measure_model,
        model_looks=1 if measure_model is not None else 0,
        check=check_all,
        cost=cost,
    )


def _check_format(tensor: Tensor, working: Sequence[Format]) -> None:
    if tensor.working not in working:
        raise RecipeError(
            f"numerics mergekit: tensor {tensor.name!r} would be computed in "
            f"{tensor.working.name}, expected {', '.join(each.name for each in working)}; set "
            "dtype in the recipe, or leave --numerics out"
        )


def _check(tensor: Tensor, parameters: Iterable[ParameterSpec], known: set[str], name: str) -> None:
    if any(device.memory_of(each) != "host" for each in tensor.ops.backends.values()):
        raise RecipeError(
            "numerics mergekit: only torch's CPU operators give mergekit's bits, found backends "
            f"{sorted(set(tensor.ops.backends.values()))}; give --backend cpu"
        )
    for parameter in parameters:
        if parameter.name in known or parameter.ignored:
            continue
        rows = tensor.model_parameters if parameter.scope == "model" else (tensor.parameters,)
        for row in rows:
            if row[parameter.name] != parameter.default:
                raise RecipeError(
                    f"numerics mergekit: mergekit's {name} has no {parameter.name!r}, found "
                    f"{shown(row[parameter.name])} for tensor {tensor.name!r}; leave it out, or "
                    "leave --numerics out"
                )
