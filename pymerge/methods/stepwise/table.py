"""Which methods have a form that rounds as mergekit does, and the module of each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from pymerge.errors import RecipeError
from pymerge.methods.protocol import Method
from pymerge.methods.registry import get_method
from pymerge.names import listed

#: A module holds ``METHODS``: the form of each of its methods by name.
MODULES: Mapping[str, str] = {
    "arcee_fusion": "arcee_fusion",
    "breadcrumbs": "trim",
    "breadcrumbs_ties": "trim",
    "dare_linear": "random_masks",
    "dare_ties": "random_masks",
    "della": "random_masks",
    "della_linear": "random_masks",
    "karcher": "sphere",
    "linear": "linear",
    "model_stock": "model_stock",
    "multislerp": "sphere",
    "nearswap": "linear",
    "nuslerp": "slerp",
    "passthrough": "linear",
    "ram": "ram",
    "ramplus_tl": "ram",
    "sce": "sce",
    "slerp": "slerp",
    "task_arithmetic": "trim",
    "ties": "trim",
}


def stepwise_method(name: str) -> Method:
    """The form of mergekit's method ``name`` that rounds every step.

    :raises RecipeError: there is no such method, or mergekit has none of that name.
    """
    method = get_method(name)
    if name not in MODULES:
        raise RecipeError(
            f"numerics mergekit: {name!r} is no method of mergekit; it has {listed(MODULES)}. "
            "Leave --numerics out for this method"
        )
    forms: Mapping[str, Method] = import_module(f"pymerge.methods.stepwise.{MODULES[name]}").METHODS
    return forms[method.spec.name]
