"""Recipe and headers to an ordered plan: jobs, memory, bytes, exact output layout.

The package shares its name with the function :func:`pymerge.plan`: once it is imported, Python
binds ``pymerge.plan`` to it. So it can be called, and then is that function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from pymerge.plan.assemble import SHARD_BYTES, Drafted, assemble
from pymerge.plan.model import Inputs, Job, Part, Plan, Tiling
from pymerge.plan.planner import make_plan

__all__ = [
    "SHARD_BYTES",
    "Drafted",
    "Inputs",
    "Job",
    "Part",
    "Plan",
    "Tiling",
    "assemble",
    "make_plan",
]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        from pymerge.api import plan

        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
