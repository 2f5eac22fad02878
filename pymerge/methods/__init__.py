"""Merge methods, one file each, in measure → decide → apply form."""

from __future__ import annotations

from pymerge.methods.registry import METHODS, get_method, specs

__all__ = ["METHODS", "get_method", "specs"]
