"""Our methods as merge methods of sd-mecha, and its own through our kernels.

:func:`register` adds a merge method ``pymerge_NAME`` to sd-mecha for every method that can merge
one tensor at a time: called in recipes like sd-mecha's own, serialised and read back like them (in
a program that has called :func:`register`). :func:`install` makes ``weighted_sum``, ``n_average``,
``slerp``, ``ties_sum`` and ``ties_sum_extended`` of sd-mecha, and all that is made of them
(``add_difference_ties``, ``add_ties_with_dare``, ...), compute with our kernels; :func:`uninstall`
undoes it. Importing this changes nothing.

A method with a base takes it first. Parameters are those of merge recipes; one per model is a text
with a number for all, or one for each: ``weight="0.3, 0.7"``. What a method ranks over the whole
model is ranked within each tensor, because sd-mecha merges key by key; methods that cannot do
without the whole model are not there.

What :func:`install` swaps keeps sd-mecha's meaning: of each delta the elements that reach the k-th
magnitude, all that equal it included; a vote by count of signs, or with ``vote_sgn`` by their sum;
nothing where the vote is a draw; the mean of those that agree. ``apply_stock: False`` and
``apply_median`` of ``ties_sum_extended`` are left to sd-mecha, with a warning. The masks of
``ties_sum_with_dropout`` are sd-mecha's own, from torch's generator, so that a seed gives the
same; so are ``dropout`` and ``model_stock``, whose cosines are of neighbours alone
(``pymerge_model_stock`` takes those of all pairs).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.errors import RecipeError
from pymerge.integrations.hosts import (
    HostWarning,
    by_tensor,
    elected_by_count,
    host_version,
    merged,
)
from pymerge.methods import METHODS
from pymerge.methods.spec import MethodSpec, ParameterSpec

if TYPE_CHECKING:
    import torch

KNOWN = ("1.1.5", "1.1.6", "1.1.7", "1.1.8")
PREFIX = "pymerge_"

_TYPES = {"float": float, "int": int, "bool": bool, "str": str}

_registered: dict[str, Any] = {}
_installed: dict[str, Callable[..., Any]] = {}


def register() -> Mapping[str, Any]:
    """Add our methods to sd-mecha, once; its merge methods by our methods' names.

    >>> ours = register()  # doctest: +SKIP
    >>> recipe = ours["wudi"](base, a, b)  # doctest: +SKIP

    :raises BackendError: sd-mecha is not installed.
    """
    host_version("sd-mecha", KNOWN)
    for name in METHODS:
        if name not in _registered and is_by_tensor(name):
            _registered[name] = _register(METHODS[name].spec)
    return dict(_registered)


def is_by_tensor(name: str) -> bool:
    """Whether a method can merge one tensor at a time."""
    try:
        by_tensor(METHODS[name].spec, {}, "sd-mecha")
    except RecipeError:
        return False
    return True


def _register(spec: MethodSpec) -> Any:
    import torch
    from sd_mecha import Parameter, Return, merge_method

    def merge(*inputs: torch.Tensor, key: str = "tensor", **given: Any) -> torch.Tensor:
        parameters = {name.rstrip("_"): value for name, value in given.items()}
        parameters = {name: parameters[name] for name in spec.parameters if name in parameters}
        base, tensors = (None, inputs) if spec.base != "required" else (inputs[0], inputs[1:])
        settings = _parameters(spec, parameters, len(tensors), key)
        chosen = by_tensor(spec, settings, "sd-mecha")
        return merged(spec.name, base, tensors, dtype=inputs[0].dtype, name=key, **chosen)

    tensor = Parameter(torch.Tensor, "weight")
    kinds = inspect.Parameter
    listed = []
    if spec.base == "required":
        listed.append(kinds("base", kinds.POSITIONAL_OR_KEYWORD, annotation=tensor))
    listed.append(kinds("models", kinds.VAR_POSITIONAL, annotation=tensor))
    for name, each in spec.parameters.items():
        if not each.ignored:
            listed.append(_argument(spec, name, each))
    listed.append(kinds("given", kinds.VAR_KEYWORD))
    merge.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        listed, return_annotation=Return(torch.Tensor, "weight")
    )
    merge.__doc__ = f"{spec.summary} {spec.paper}"
    return merge_method(merge, identifier=PREFIX + spec.name)


def _argument(spec: MethodSpec, name: str, each: ParameterSpec) -> inspect.Parameter:
    """A parameter as sd-mecha declares it; one for each model is a text."""
    from sd_mecha import Parameter

    default: Any = by_tensor(spec, {}, "sd-mecha").get(name, each.default)
    kind = _TYPES[each.kind]
    if each.scope == "model":
        kind, default = str, "1" if default is None else str(default)
    elif default is None:
        default = inspect.Parameter.empty
    elif spec.presets:
        # Not given: the preset's value is not hidden behind the default.
        default = each.default if name == "preset" else None
    python_name = f"{name}_" if name == "lambda" else name
    return inspect.Parameter(
        python_name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Parameter(kind, "param"),
    )


def _parameters(
    spec: MethodSpec, given: Mapping[str, Any], num_models: int, key: str
) -> dict[str, Any]:
    """What was given, with the texts of parameters that each model has taken apart."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        each = spec.parameters[name]
        found[name] = value
        if each.scope == "model":
            found[name] = [_number(spec, name, part) for part in str(value).split(",")]
            if len(found[name]) == 1:
                found[name] *= num_models
            if len(found[name]) != num_models:
                raise RecipeError(
                    f"{PREFIX}{spec.name}: {name}: expected one number or {num_models}, one for "
                    f"each model, found {value!r} (key {key})"
                )
    return found


def _number(spec: MethodSpec, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(
            f"{PREFIX}{spec.name}: {name}: expected numbers with commas between, found {text!r}"
        ) from None


def install() -> None:
    """Make sd-mecha's own methods compute with our kernels.

    :raises BackendError: sd-mecha is not installed.
    """
    host_version("sd-mecha", KNOWN)
    for identifier, function in _SWAPPED.items():
        method = _theirs(identifier)
        if method is not None and identifier not in _installed:
            _installed[identifier] = method.__wrapped__
            method.__wrapped__ = function


def uninstall() -> None:
    """Give sd-mecha its own computation back."""
    while _installed:
        identifier, function = _installed.popitem()
        _theirs(identifier).__wrapped__ = function


def _theirs(identifier: str) -> Any:
    """sd-mecha's method, or None with a warning where this version has none of that name."""
    from sd_mecha.extensions import merge_methods

    try:
        return merge_methods.resolve(identifier)
    except (KeyError, ValueError):
        _left(f"it has no method {identifier}, which stays as it is")
        return None


def _left(why: str) -> None:
    warnings.warn(f"sd-mecha: {why}", HostWarning, stacklevel=3)


def _is_theirs(*tensors: torch.Tensor) -> bool:
    """Tensors that we leave to sd-mecha, with a warning: integers, shapes that are broadcast."""
    formats = all(tensor.is_floating_point() for tensor in tensors)
    shapes = {tensor.shape for tensor in tensors}
    if formats and len(shapes) == 1:
        return not tensors[0].numel()
    _left(
        f"tensors of {', '.join(str(t.dtype) for t in tensors)} and shapes "
        f"{', '.join(str(tuple(t.shape)) for t in tensors)} are merged by sd-mecha itself"
    )
    return True


def _weighted_sum(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], alpha: Any = 0.5, **kwargs: Any
) -> Any:
    key = kwargs["key"]
    share = _number_of(alpha)
    if share is None or share in (0.0, 1.0) or _is_theirs(a[key], b[key]):
        return _installed["weighted_sum"](a, b, alpha, **kwargs)
    first, second = a[key], b[key]
    return merged("task_arithmetic", first, [second], dtype=first.dtype, weight=share, name=key)


def _n_average(*models: Mapping[str, torch.Tensor], **kwargs: Any) -> Any:
    key = kwargs["key"]
    tensors = [model[key] for model in models]
    if _is_theirs(*tensors):
        return _installed["n_average"](*models, **kwargs)
    return merged("linear", None, tensors, dtype=tensors[0].dtype, weight=1.0, name=key)


def _slerp(a: torch.Tensor, b: torch.Tensor, alpha: Any = 0.5) -> Any:
    """The directions on the sphere between, with the norm between: a weighted sum."""
    import torch

    share = _number_of(alpha)
    if share is None or _is_theirs(a, b):
        return _installed["slerp"](a, b, alpha)
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64).item() for each in (a, b)]
    if not min(norms):
        return merged("task_arithmetic", a, [b], dtype=a.dtype, weight=share)
    weights = _spherical(a, b, norms, share)
    return merged("linear", None, [a, b], dtype=a.dtype, weight=weights, normalize=False)


def _spherical(
    a: torch.Tensor, b: torch.Tensor, norms: Sequence[float], share: float
) -> list[float]:
    """What ``a`` and ``b`` are multiplied by; linear where their directions are the same."""
    import math

    import numpy as np

    from pymerge.ops import gram_n, view

    sums = gram_n(None, [view(each.detach().contiguous()) for each in (a, b)], span=1 << 16)
    inner = math.fsum(np.asarray(sums)[:, 1].tolist())
    omega = math.acos(max(-1.0, min(1.0, inner / (norms[0] * norms[1]))))
    if math.sin(omega) < 1e-6:
        return [1 - share, share]
    norm = (1 - share) * norms[0] + share * norms[1]
    parts = (math.sin((1 - share) * omega), math.sin(share * omega))
    return [
        norm * part / (math.sin(omega) * length) for part, length in zip(parts, norms, strict=True)
    ]


def _number_of(value: Any) -> float | None:
    """A parameter as one number; None where it is one for each element."""
    if not hasattr(value, "numel"):
        return float(value)
    return float(value.item()) if value.numel() == 1 else None


def _ties_sum(*models: torch.Tensor, k: float = 1.0, vote_sgn: bool = False) -> Any:
    if not models or _is_theirs(*models):
        return _installed["ties_sum"](*models, k=k, vote_sgn=vote_sgn)
    return _ties(models, float(k), bool(vote_sgn))


def _ties_sum_extended(
    *models: torch.Tensor,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    apply_median: bool = False,
    **others: Any,
) -> Any:
    if models and apply_stock and not apply_median and not _is_theirs(*models):
        return _ties(models, float(k), bool(vote_sgn))
    if models and (apply_median or not apply_stock):
        what = "apply_median" if apply_median else "apply_stock: False"
        _left(f"ties_sum_extended with {what} is sd-mecha's own computation")
    return _installed["ties_sum_extended"](
        *models,
        k=k,
        vote_sgn=vote_sgn,
        apply_stock=apply_stock,
        apply_median=apply_median,
        **others,
    )


def _ties(models: Sequence[torch.Tensor], k: float, vote_sgn: bool) -> torch.Tensor:
    import torch

    num = models[0].numel()
    # sd-mecha keeps all that reach the magnitude of rank num - max(int((1 - k)·num), 1) + 1 from
    # the top; ours with ties: all that of rank int(density·num) + 1.
    density = (num - max(int((1 - k) * num), 1) + 0.5) / num
    rule = {"density": density, "ties": "all", "zero_sign": "skip", "merge": "count"}
    zeros = torch.zeros_like(models[0])
    kind = models[0].dtype
    if vote_sgn:
        return merged("ties", zeros, models, dtype=kind, weight=1.0, elect="plain", **rule)
    kept = [merged("ties", zeros, [each], dtype=kind, weight=1.0, **rule) for each in models]
    return elected_by_count(kept, [1.0] * len(kept), zero_sign=0).to(kind)


_SWAPPED: Mapping[str, Callable[..., Any]] = {
    "weighted_sum": _weighted_sum,
    "n_average": _n_average,
    "slerp": _slerp,
    "ties_sum": _ties_sum,
    "ties_sum_extended": _ties_sum_extended,
}
