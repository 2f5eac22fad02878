"""Waiting for tasks."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from pymerge.engine.blocks import Stopped


def gather(futures: Iterable[Future[Any]]) -> list[Any]:
    """Results in order; on a failure the other tasks are waited for before it is raised, because
    they still use blocks that the caller is about to give back."""
    started: list[Future[Any]] = []
    failures: list[BaseException] = []
    try:
        for future in futures:
            started.append(future)
    except BaseException as error:
        failures.append(error)
    failures += [each for future in started if (each := future.exception()) is not None]
    # Stopped is only what a failure elsewhere brings about.
    for failure in sorted(failures, key=lambda each: isinstance(each, Stopped)):
        raise failure
    return [future.result() for future in started]
