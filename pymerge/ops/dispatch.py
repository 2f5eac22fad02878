"""Which backend runs an op: the first that can, or the one asked for, or an error with reasons."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from pymerge.errors import BackendError
from pymerge.ops import cpu, reference
from pymerge.ops.table import OPS

logger = logging.getLogger(__name__)

REFERENCE = "reference"
#: Backends by name, in order of preference. Each answers ``why_not(op)`` with None or a sentence.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, REFERENCE: reference}

_logged: set[tuple[str, str]] = set()


class Choice(NamedTuple):
    """The backend of an op, and why each backend preferred to it was passed over."""

    backend: str
    passed_over: dict[str, str]


def why_not(backend: str, op: str) -> str | None:
    """Why a backend cannot run an op here, as a sentence, or None if it can."""
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if backend not in OPS[op].backends:
        return f"backend {backend} has no {op}"
    answer: str | None = BACKENDS[backend].why_not(op)
    return answer


def choose(op: str, asked: str | None = None) -> Choice:
    """The backend for ``op``.

    ``asked``, or else the environment variable PYMERGE_BACKEND, names one that must be used:
    BackendError says why it cannot be. Otherwise the first that can is taken and what was passed
    over is logged once; the reference, far too slow for a merge, must be asked for.
    """
    asked = asked or os.environ.get("PYMERGE_BACKEND") or None
    if asked is not None:
        problem = why_not(asked, op)
        if problem is not None:
            raise BackendError(f"backend {asked} was asked for and cannot run {op}: {problem}")
        return Choice(asked, {})
    passed_over: dict[str, str] = {}
    for backend in BACKENDS:
        if backend == REFERENCE:
            continue
        problem = why_not(backend, op)
        if problem is None:
            return Choice(backend, passed_over)
        passed_over[backend] = problem
        if (backend, op) not in _logged:
            _logged.add((backend, op))
            logger.info("backend %s cannot run %s: %s", backend, op, problem)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(
        f"no backend can run {op}: {reasons}; the backend {REFERENCE!r} can, very slowly, where it "
        "is asked for by name"
    )


def function(op: str, backend: str) -> Callable[..., Any]:
    """The op as a backend offers it; all backends share the signatures of the table."""
    if op not in OPS or backend not in BACKENDS:
        why_not(backend, op)
    result: Callable[..., Any] = getattr(BACKENDS[backend], op)
    return result
