"""Importing a package, or a class of it, only when something in it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def without(package: ModuleType, name: str) -> Iterator[None]:
    """Inside, ``package.name`` is an empty class that stands for the one of that name: for modules
    that mention it in annotations alone, which a lazy package would load much for.

    What is there already is left alone.
    """
    if name in vars(package):
        yield
        return
    stand_in = type(name, (), {"__module__": package.__name__})
    setattr(package, name, stand_in)
    try:
        yield
    finally:
        if vars(package).get(name) is stand_in:
            delattr(package, name)


@contextmanager
def deferred(module: str, function: str) -> Iterator[None]:
    """Inside, ``from module import function`` gives a function that imports the module when it is
    called; anything else that is asked of the module imports it at once.

    A module that is imported already is left alone.
    """
    if module in sys.modules:
        yield
        return
    stand_in = _Deferred(module, function)
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]


class _Deferred(ModuleType):
    """A module of which one function is known by name."""

    def __init__(self, module: str, function: str) -> None:
        super().__init__(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._real(), function)(*args, **kwargs)

        setattr(self, function, call)

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":  # the import system and inspect probe for such names
            raise AttributeError(name)
        return getattr(self._real(), name)
