"""Shared by the tests of this room: forced instruction sets, guarded memory, byte comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiles import Guarded, check_same

from pymerge import ops


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, forced while the test runs."""
    before = ops.isa()
    ops.use_isa(request.param)
    yield request.param
    ops.use_isa(before)


@pytest.fixture(scope="session")
def guarded() -> type[Guarded]:
    return Guarded


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[Any, Any, str], None]:
    return check_same
