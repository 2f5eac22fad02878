"""PEFT's ``add_weighted_adapter`` through our kernels, and our matrix methods for adapters.

:func:`add_weighted_adapter` adds an adapter to a live model as PEFT's method of the same name does.
Configuration, injection and checks stay PEFT's; what is computed of each module's factors is ours.
:func:`install` makes PEFT's own method compute so, :func:`uninstall` undoes it; importing this
changes nothing.

PEFT's combination types keep their meaning, in float32 with one rounding. Of equal magnitudes those
that come first are kept, where PEFT leaves it to ``torch.topk``. ``dare_*`` draws the masks of
``pymerge`` from ``seed``, or from a number that torch's generator draws: the same seed does not
give PEFT's masks. The singular value decompositions are exact, of the core space that the factors
span for ``svd``, else of the merged update; with ``svd_clamp``, which depends on the signs of the
singular vectors, they are torch's as PEFT asks for them, and only then ``svd_full_matrices`` and
``svd_driver`` matter. ``cat`` is PEFT's own: it computes nothing.

Beside them: ``knots``, ``tsv_m``, ``iso_c``, ``iso_cts``, ``wudi`` and ``optmerge`` merge the
updates as these methods do and cut the result to ``svd_rank``; what commutes with isometries works
in the core space. ``robust_merge`` works on the factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pymerge.errors import PymergeError
from pymerge.integrations.hosts import HostWarning, host_version
from pymerge.integrations.peft_modules import (
    MATRICES,
    PEFTS,
    Settings,
    by_factor,
    by_product,
    check_type,
    share_of,
)
from pymerge.methods import get_method
from pymerge.names import listed, shown
from pymerge.sizes import counted

KNOWN = ("0.21",)
ELECTIONS = ("total", "frequency")
#: The methods of PEFT's LoraModel that compute.
BY_FACTOR = "_generalized_task_arithmetic_weighted_adapter"
BY_PRODUCT = "_svd_generalized_task_arithmetic_weighted_adapter"

_installed: dict[str, Any] = {}


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    seed: int | None = None,
    threads: int | None = None,
    **parameters: Any,
) -> None:
    """Add an adapter made of others to a model, as PEFT's ``PeftModel.add_weighted_adapter``.

    :param model: a PeftModel with LoRA adapters, or its ``base_model``.
    :param combination_type: one of PEFT's, or of ``MATRICES``, or ``robust_merge``.
    :param svd_rank: of the new adapter, for types with ``svd`` and for ``MATRICES``; default the
        largest rank of the adapters.
    :param seed: draws the masks of ``dare_*``; default a number from torch's generator.
    :param parameters: of a method of ``MATRICES``, with the values a recipe may give them.
    :raises PymergeError: an argument is wrong, or the model has no LoRA adapters.
    :raises PlanError: the method cannot merge these adapters.

    Raises also what PEFT raises.
    """
    host = _lora_model(model)
    if len(weights) != len(adapters):
        raise PymergeError(
            f"expected a weight for each of {counted(len(adapters), 'adapter')} "
            f"({', '.join(adapters)}), found {len(weights)}"
        )
    kind = combination_type
    if kind in MATRICES and density is not None and "density" in get_method(kind).spec.parameters:
        parameters["density"] = density
    _check(kind, density, majority_sign_method, parameters)
    settings = Settings(kind, seed=seed, threads=threads, parameters=parameters)
    settings.names = {id(module): name for name, module in host.model.named_modules()}
    theirs = combination_type
    if kind in MATRICES or kind == "robust_merge":
        theirs = "linear" if kind == "robust_merge" else "svd"
        settings.weights = list(weights)
        _check_scale(host, adapters, adapter_name, settings)
    else:
        _warn_of_rslora(host, adapters)
    is_new = adapter_name not in host.peft_config
    with _computing(host, settings), _whole_or_not(host, adapter_name if is_new else None):
        host.add_weighted_adapter(
            list(adapters),
            list(weights),
            adapter_name,
            combination_type=theirs,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        )


def install() -> None:
    """Make PEFT's own ``add_weighted_adapter`` of LoRA models compute with our kernels.

    :raises BackendError: PEFT is not installed.
    """
    host_version("peft", KNOWN)
    if _installed:
        return
    kind = _lora_class()
    settings = Settings(None)
    for name, function in _functions(settings).items():
        _installed[name] = getattr(kind, name)
        setattr(kind, name, _as_method(function))


def uninstall() -> None:
    """Give PEFT its own computation back."""
    while _installed:
        name, function = _installed.popitem()
        setattr(_lora_class(), name, function)


@contextmanager
def _whole_or_not(host: Any, adapter: str | None) -> Iterator[None]:
    """Take a new adapter away again that could not be made."""
    try:
        yield
    except BaseException:
        if adapter is not None and adapter in host.peft_config:
            host.delete_adapter(adapter)
        raise


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """As an attribute of a class."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _functions(settings: Settings) -> dict[str, Callable[..., Any]]:
    return {BY_FACTOR: partial(by_factor, settings), BY_PRODUCT: partial(by_product, settings)}


@contextmanager
def _computing(host: Any, settings: Settings) -> Iterator[None]:
    """While it lasts this one model computes with our kernels."""
    functions = _functions(settings)
    for name, function in functions.items():
        object.__setattr__(host, name, function)
    try:
        yield
    finally:
        for name in functions:
            object.__delattr__(host, name)


def _check(kind: str, density: float | None, election: str, parameters: Mapping[str, Any]) -> None:
    own = kind in MATRICES or kind == "robust_merge"
    if not own:
        check_type(kind.removesuffix("_svd") if kind != "svd" else kind)
    if election not in ELECTIONS:
        raise PymergeError(
            f"majority_sign_method: expected {listed(ELECTIONS)}, found {shown(election)}"
        )
    if parameters and kind not in MATRICES:
        raise PymergeError(
            f"{kind} has no parameter {listed(parameters)}; parameters are for {listed(MATRICES)}"
        )
    if own and density is not None and "density" not in parameters:
        raise PymergeError(f"density: expected none for {kind}, found {shown(density)}")
    if not own and PEFTS[kind.removesuffix("_svd") if kind != "svd" else kind]:
        share_of(kind, density)


def _lora_class() -> Any:
    from peft.tuners.lora.model import LoraModel

    return LoraModel


def _lora_model(model: Any) -> Any:
    host_version("peft", KNOWN)
    inner = getattr(model, "base_model", model)
    for each in (inner, model):
        if isinstance(each, _lora_class()):
            return each
    raise PymergeError(
        f"expected a PeftModel with LoRA adapters, found {type(model).__name__} of "
        f"{type(inner).__name__}; call the model's own add_weighted_adapter"
    )


def _check_scale(host: Any, adapters: Sequence[str], adapter_name: str, settings: Settings) -> None:
    if len(adapters) < 2:
        raise PymergeError(
            f"{settings.kind}: expected two adapters or more, found {len(adapters)}: PEFT itself "
            "combines a single one linearly; use linear"
        )
    # The new adapter's scale by its configuration, 1 or for rsLoRA the root of the rank.
    settings.scaling = lambda target: float(target.scaling[adapter_name])


def _warn_of_rslora(host: Any, adapters: Sequence[str]) -> None:
    config = host.peft_config.get(adapters[0]) if adapters else None
    if config is not None and getattr(config, "use_rslora", False):
        warnings.warn(
            f"adapter {adapters[0]!r} is rsLoRA: PEFT gives the combined adapter its configuration "
            "and so a scale of the root of its rank instead of 1, by which the result is too "
            "large; name an adapter without rsLoRA first",
            HostWarning,
            stacklevel=3,
        )
