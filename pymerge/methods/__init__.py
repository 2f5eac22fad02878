"""Merge methods, one file each, in measure → decide → apply form."""

from __future__ import annotations

from pymerge.methods import linear, passthrough, task_arithmetic, ties
from pymerge.methods.registry import METHODS, get_method, specs

__all__ = ["METHODS", "get_method", "linear", "passthrough", "specs", "task_arithmetic", "ties"]
