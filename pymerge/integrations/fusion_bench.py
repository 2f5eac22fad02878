"""FusionBench's merging algorithms through our engine, usable by ``_target_``.

A configuration of FusionBench changes one line: where ``_target_`` is
``fusion_bench.method.TiesMergingAlgorithm`` it becomes
``pymerge.integrations.fusion_bench.TiesMergingAlgorithm``. The classes have the names of
FusionBench's, are subclasses of them and take the same fields with the same meaning; only ``run``
is ours. What they do not understand they hand to FusionBench's own ``run``, with a warning
that says what and why. ``PymergeAlgorithm(method=..., parameters)`` runs any method of ours that
makes one dense model.

The classes are made when they are asked for: importing this file imports nothing of FusionBench.

Models are taken as the pool gives them: modules, or a ``LazyStateDict``, of which one tensor of
every model is in memory at a time. The result is what FusionBench gives: the pretrained model (or
the first) with new weights, a copy where ``inplace`` is false, a module of the lazy state dict's
``meta_module``, or a dict where there is none. Integer buffers stay the base's. Parameters that
are tied in every model are ranked once, where FusionBench counts both of their names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from pymerge.integrations.fusion_bench_data import SPECIAL
from pymerge.integrations.fusion_bench_fields import ALGORITHMS, ALIASES, Algorithm
from pymerge.integrations.fusion_bench_pools import (
    Left,
    as_pool,
    merged,
    with_base,
    without_base,
)
from pymerge.integrations.hosts import HostWarning, host_version

KNOWN = ("0.2.33",)


def __getattr__(name: str) -> Any:
    name = ALIASES.get(name, name)
    if name == "PymergeAlgorithm":
        made = _general()
    elif name in ALGORITHMS:
        made = _algorithm(name, ALGORITHMS[name])
    elif name in SPECIAL:
        special = SPECIAL[name]
        made = _subclass(name, _theirs(special.module, name), special.run)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *ALGORITHMS, *SPECIAL, *ALIASES, "PymergeAlgorithm"})


def _theirs(module: str, name: str) -> Any:
    host_version("fusion-bench", KNOWN)
    return getattr(import_module(f"fusion_bench.method.{module}"), name)


def _subclass(name: str, theirs: Any, run: Callable[..., Any]) -> Any:
    """FusionBench's class with another ``run``, which may leave a run to it."""

    def either(self: Any, modelpool: Any, **kwargs: Any) -> Any:
        import torch

        try:
            with torch.no_grad():
                return run(self, as_pool(modelpool))
        except Left as why:
            warnings.warn(
                f"{name}: {why}; this run is FusionBench's own", HostWarning, stacklevel=2
            )
            return theirs.run(self, modelpool, **kwargs)

    doc = f"FusionBench's ``{name}`` through pymerge; see its documentation for the fields."
    return type(name, (theirs,), {"run": either, "__doc__": doc, "__module__": __name__})


def _algorithm(name: str, how: Algorithm) -> Any:
    def run(self: Any, pool: Any) -> Any:
        gather = how.gather or with_base
        pooled = gather(self, pool)
        parameters = how.parameters(self, pooled)
        return merged(how.method, pooled, parameters, how.kept(self, pooled), _in_place(self))

    return _subclass(name, _theirs(how.module, name), run)


def _in_place(self: Any) -> bool:
    return bool(getattr(self, "inplace", True))


def _general() -> Any:
    """Any method: ``_target_: ...PymergeAlgorithm``, ``method: pcb``, and its parameters."""
    host_version("fusion-bench", KNOWN)
    from fusion_bench import BaseAlgorithm

    from pymerge.methods import get_method

    class PymergeAlgorithm(BaseAlgorithm):  # type: ignore[misc]
        """A merge method of pymerge: ``method`` names it, every other field is a parameter of it
        with the values of a merge recipe. ``threads`` and ``numerics`` are as of
        ``pymerge.merge_state_dicts``."""

        def __init__(self, method: str, inplace: bool = True, **parameters: Any) -> None:
            get_method(method)
            self.method, self.inplace, self.parameters = method, inplace, parameters
            super().__init__()

        @property
        def config(self) -> Any:
            from omegaconf import OmegaConf

            target = f"{__name__}.PymergeAlgorithm"
            own = {"_target_": target, "method": self.method, "inplace": self.inplace}
            return OmegaConf.create({**own, **self.parameters})

        def run(self, modelpool: Any) -> Any:
            pool = as_pool(modelpool)
            spec = get_method(self.method).spec
            alone = spec.base == "input" or (spec.base == "optional" and not pool.has_pretrained)
            pooled = (without_base if alone else with_base)(self, pool)
            values = {
                name: list(value)
                if isinstance(value, Sequence) and not isinstance(value, str)
                else value
                for name, value in self.parameters.items()
            }
            return merged(self.method, pooled, values, in_place=self.inplace)

    PymergeAlgorithm.__module__ = __name__
    PymergeAlgorithm.__qualname__ = "PymergeAlgorithm"
    return PymergeAlgorithm
