"""Imports of packages that only the demo needs, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from pymerge.errors import PymergeError

#: Import name -> name on the package index, where the two differ.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image"}


def optional(module: str) -> ModuleType:
    """Import ``module`` or raise `PymergeError` with the package and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        package = DISTRIBUTIONS.get(root, root)
        raise PymergeError(
            f"the demo needs the package {package}, which cannot be imported here ({error}). "
            f"Install it with: pip install {package}"
        ) from error
