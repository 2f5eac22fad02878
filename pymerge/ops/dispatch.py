"""Which backend runs an op: the first that can, or the one asked for, or an error with reasons."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

from pymerge.errors import BackendError
from pymerge.ops.table import OPS

logger = logging.getLogger(__name__)

REFERENCE = "reference"
#: Backends by name, in order of preference, and the modules that offer their ops. Each module
#: answers ``why_not(op)`` with None or a sentence; one that has ``emulated()`` answers whether it
#: would run in an emulator, which must be asked for.
BACKENDS: dict[str, str] = {
    "cuda": "pymerge.ops.cuda",
    "triton": "pymerge.ops.triton",
    "cpu": "pymerge.ops.cpu",
    REFERENCE: "pymerge.ops.reference",
}
#: Backends that work on one memory: a plan takes all its ops from one group.
GROUPS = (("cuda", "triton"), ("cpu",))

_logged: set[tuple[str, str]] = set()


class Choice(NamedTuple):
    """The backend of an op, and why each backend preferred to it was passed over."""

    backend: str
    passed_over: dict[str, str]


def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported when it is first asked for.

    :raises BackendError: there is no such backend.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def why_not(backend: str, op: str) -> str | None:
    """Why a backend cannot run an op here, as a sentence, or None if it can."""
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    module = backend_module(backend)
    if backend not in OPS[op].backends:
        return f"backend {backend} has no {op}"
    answer: str | None = module.why_not(op)
    return answer


def choose(op: str, asked: str | None = None) -> Choice:
    """The backend for ``op``, as :func:`choose_together` for it alone."""
    return choose_together([op], asked)[op]


def choose_together(names: Iterable[str], asked: str | None = None) -> dict[str, Choice]:
    """The backend for each op of a plan.

    ``asked``, or else the environment variable PYMERGE_BACKEND, names one that must be used for
    all: BackendError says why it cannot be. Otherwise the first group of backends that can run
    every op is taken, for each op its first backend that can, and what was passed over is logged
    once; the reference, far too slow for a merge, must be asked for.
    """
    ops = list(dict.fromkeys(names))
    asked = asked or os.environ.get("PYMERGE_BACKEND") or None
    if asked is not None:
        for op in ops:
            problem = why_not(asked, op)
            if problem is not None:
                raise BackendError(f"backend {asked} was asked for and cannot run {op}: {problem}")
        return {op: Choice(asked, {}) for op in ops}
    passed_over: dict[str, dict[str, str]] = {op: {} for op in ops}
    for group in GROUPS:
        chosen: dict[str, Choice] = {}
        for op in ops:
            for backend in group:
                problem = why_not(backend, op) or _emulated(backend)
                if problem is None:
                    chosen[op] = Choice(backend, dict(passed_over[op]))
                    break
                _pass_over(op, backend, problem, passed_over)
        if len(chosen) == len(ops):
            return chosen
        missing = next(op for op in ops if op not in chosen)
        for op, choice in chosen.items():
            reason = f"it works on other memory than the backend of {missing}, which it lacks"
            _pass_over(op, choice.backend, reason, passed_over)
    op = next(op for op in ops if "cpu" in passed_over[op])
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over[op].items())
    raise BackendError(
        f"no backend can run {op}: {reasons}; the backend {REFERENCE!r} can, very slowly, where it "
        "is asked for by name"
    )


def _emulated(backend: str) -> str | None:
    emulated = getattr(backend_module(backend), "emulated", None)
    if emulated is None or not emulated():
        return None
    return "it runs in an emulator here, far too slowly for a merge; ask for it by name"


def _pass_over(op: str, backend: str, reason: str, passed_over: dict[str, dict[str, str]]) -> None:
    passed_over[op][backend] = reason
    if (backend, op) not in _logged:
        _logged.add((backend, op))
        logger.info("backend %s cannot run %s: %s", backend, op, reason)


def function(op: str, backend: str) -> Callable[..., Any]:
    """The op as a backend offers it; all backends share the signatures of the table."""
    if op not in OPS:
        why_not(backend, op)
    result: Callable[..., Any] = getattr(backend_module(backend), op)
    return result
