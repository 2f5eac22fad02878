"""Importing a package only when something in it is asked for."""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any


class _Delayed(ModuleType):
    """Stands for a package until an attribute that it does not have yet is asked for, then becomes
    it. Its spec and path are there at once, so that looking for it or a part of it works."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        # The import system and inspect probe for such names; they say nothing about the package.
        if spec is None or spec.loader is None or (name[:2] == "__" and name != "__version__"):
            raise AttributeError(name)
        with _LOCK:
            if type(self) is _Delayed:
                object.__setattr__(self, "__class__", ModuleType)
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    object.__setattr__(self, "__class__", _Delayed)  # the next use fails as well
                    raise
        return getattr(self, name)


_LOCK = threading.RLock()


def delay(package: str) -> None:
    """Let ``import package`` cost nothing until something in it is used.

    A package that is imported already or is not installed is left alone.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Delayed
    sys.modules[package] = module
