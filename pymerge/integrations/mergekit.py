"""pymerge inside mergekit: its planned merges run by our engine, and its maths by our methods.

``redirect()`` replaces mergekit's executor (``pymerge run -- mergekit-yaml …`` does this): what its
planner decided is lowered to our plan, tensors that we do not understand are computed by mergekit
as written, with a message. ``redirect(whole=True)`` replaces ``run_merge`` as well, whose recipe we
plan ourselves. ``install()`` replaces only the maths, method by method. Nothing happens on import.

Known is mergekit 0.1.5: names inside it differ from release to release.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pymerge.errors import BackendError
from pymerge.integrations.mergekit_tally import TALLY
from pymerge.names import listed

if TYPE_CHECKING:
    from pymerge.integrations.mergekit_executor import Settings
    from pymerge.methods.numerics import Numerics

#: The releases whose inner names this integration was written and tested against.
KNOWN_VERSIONS = ("0.1.5",)
#: Modules that hold the executor by name, and whose graphs are merges.
_EXECUTOR_MODULES = ("mergekit.merge", "mergekit.scripts.merge_raw_pytorch", "mergekit.evo.actors")
_EXECUTOR_NAMES = ("Executor", "MultiGPUExecutor")
#: The function that programs call, and the module that it is in.
_RUN_MERGE = ("mergekit.merge", "run_merge")

_redirected: dict[tuple[str, str], Any] = {}

__all__ = ["KNOWN_VERSIONS", "TALLY", "check_version", "install", "redirect", "restore"]
__all__ += ["uninstall"]


def check_version(*, force: bool = False) -> str:
    """The version of the mergekit that is installed.

    :param force: accept one that is not known.
    :raises BackendError: there is none, or none that is known.
    """
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            f"mergekit is not installed beside pymerge in {sys.prefix}; install it there with "
            f"`pip install mergekit=={KNOWN_VERSIONS[-1]}`"
        ) from None
    if version not in KNOWN_VERSIONS and not force:
        raise BackendError(
            f"mergekit {version} is installed, pymerge knows {listed(KNOWN_VERSIONS)}: what is "
            "replaced inside it differs from release to release. Install a known one, or accept "
            "the risk with --force (force=True)"
        )
    return version


def redirect(
    *,
    whole: bool = False,
    numerics: Numerics = "accurate",
    memory: int | str | None = None,
    threads: int | None = None,
    backend: str | None = None,
    force: bool = False,
) -> None:
    """Let merges that mergekit plans from now on be run by our engine.

    :param whole: let our engine plan them, too: ``mergekit.merge.run_merge``, also where a program
        has imported it by name, takes its configuration for a recipe of ours and its options as
        ``pymerge-yaml`` does. What we refuse is one of our errors.
    :param numerics: ``"mergekit"`` rounds every step as mergekit does.
    :param memory: bytes for the whole process, what it holds already included.
    :param threads: compute threads, default all.
    :param backend: ask for a backend by name.
    :raises BackendError: mergekit is missing or of an unknown version.

    Called again it decides anew.
    """
    from pymerge.integrations import mergekit_methods
    from pymerge.integrations.mergekit_executor import Settings, executor_class

    check_version(force=force)
    mergekit_methods.register_ours("redirect")
    settings = Settings(numerics, memory, threads, backend)
    for name in _EXECUTOR_MODULES:
        # The one of evolutionary search needs packages that few have, and is loaded by it alone.
        module = sys.modules.get(name) if ".evo." in name else importlib.import_module(name)
        for symbol in _EXECUTOR_NAMES:
            if module is not None and hasattr(module, symbol):
                host = _redirected.setdefault((name, symbol), getattr(module, symbol))
                setattr(module, symbol, executor_class(host, settings))
    _restore_run_merge()
    if whole:
        _redirect_run_merge(settings)


def _redirect_run_merge(settings: Settings) -> None:
    from pymerge.integrations.mergekit_whole import run_merge_with

    place, symbol = _RUN_MERGE
    host = _redirected[_RUN_MERGE] = getattr(sys.modules[place], symbol)
    _put_in_place_of(host, run_merge_with(host, settings))


def _restore_run_merge() -> None:
    if _RUN_MERGE in _redirected:
        place, symbol = _RUN_MERGE
        _put_in_place_of(getattr(sys.modules[place], symbol), _redirected.pop(_RUN_MERGE))


def _put_in_place_of(old: Any, new: Any) -> None:
    """Replace a ``run_merge`` also in every module that has imported it by name."""
    symbol = _RUN_MERGE[1]
    for module in list(sys.modules.values()):
        # What it has, not what a lazy one would import to answer.
        held = getattr(module, "__dict__", {})
        if held.get(symbol) is old:
            held[symbol] = new


def restore() -> None:
    """Undo :func:`redirect`."""
    from pymerge.integrations import mergekit_methods

    _restore_run_merge()
    for (name, symbol), host in _redirected.items():
        setattr(sys.modules[name], symbol, host)
    _redirected.clear()
    mergekit_methods.remove_ours("redirect")


def install(
    numerics: Numerics = "accurate", methods: Iterable[str] | None = None, *, force: bool = False
) -> tuple[str, ...]:
    """Replace mergekit's maths by ours, method by method; its executor stays.

    :param methods: names of mergekit's methods, default all. Methods that only pymerge has become
        available under their names in any case.
    :returns: the names that are computed by pymerge now.
    :raises BackendError: mergekit is missing or of an unknown version.
    :raises RecipeError: one of ``methods`` is no method that both have.
    """
    from pymerge.integrations import mergekit_methods

    check_version(force=force)
    replaced = mergekit_methods.replace_theirs(numerics, methods)
    return (*replaced, *mergekit_methods.register_ours("install"))


def uninstall() -> None:
    """Undo :func:`install`."""
    from pymerge.integrations import mergekit_methods

    mergekit_methods.restore_theirs()
    mergekit_methods.remove_ours("install")
