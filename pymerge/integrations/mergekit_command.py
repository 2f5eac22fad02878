"""mergekit's console scripts, run in this process with its executor replaced."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pymerge.errors import BackendError, RecipeError
from pymerge.integrations.delayed_import import deferred, delay, without
from pymerge.integrations.mergekit import check_version, redirect
from pymerge.integrations.mergekit_tally import LOG, TALLY
from pymerge.methods.numerics import Numerics
from pymerge.names import listed, nearest, shown

#: The scripts whose merges pass through the executor that is replaced.
MERGING = ("mergekit-yaml", "mergekit-multi", "mergekit-pytorch", "mergekit-legacy")


def run_command(
    command: Sequence[str],
    *,
    numerics: str,
    memory: str | None,
    threads: int | None,
    backend: str | None,
    force: bool,
) -> None:
    """Run a command of mergekit; leaves the program as that command does.

    Where mergekit is not installed beside us, or the command is a path into another environment,
    the pymerge of that environment does it, in this process' place.

    :param command: the name or path of a console script of mergekit, then its arguments.
    :raises BackendError: mergekit is missing or of an unknown version.
    :raises RecipeError: the command is none of mergekit's.
    """
    _go_where_it_is(command[0])
    version = check_version(force=force)
    if numerics not in get_args(Numerics):
        raise RecipeError(
            f"numerics: expected {listed(get_args(Numerics))}, found {shown(numerics)}"
        )
    script = _script(Path(command[0]).name)
    # mergekit imports peft at once and uses it only for base+adapter; that import takes seconds.
    delay("peft")
    with _without_collections():
        main = _load(script)
    redirect(
        numerics=numerics,  # type: ignore[arg-type]
        memory=memory,
        threads=threads,
        backend=backend,
        force=force,
    )
    if script.name not in MERGING:
        LOG.warning(
            "pymerge replaces nothing in %s, which runs as mergekit %s wrote it; it does in %s",
            script.name,
            version,
            listed(MERGING),
        )
    sys.argv = [script.name, *command[1:]]
    try:
        main()
    finally:
        if TALLY.merges:
            LOG.info("pymerge: %s", TALLY.as_dict())


@contextmanager
def _without_collections() -> Iterator[None]:
    """What importing makes stays: looking for garbage among it takes time and finds none."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load(script: Any) -> Any:
    """The function of a command. Those that merge mention the base class of all models in
    annotations and a function for architectures without a definition, whose module takes long to
    load."""
    if script.name not in MERGING:
        return script.load()
    transformers = importlib.import_module("transformers")
    with (
        without(transformers, "PreTrainedModel"),
        deferred("transformers.modeling_utils", "_get_tied_weight_keys"),
    ):
        return script.load()


def _go_where_it_is(command: str) -> None:
    """Become the pymerge of the environment that the command belongs to, if it is another one.

    :raises BackendError: that environment has no pymerge.
    """
    here = Path(sys.executable).parent
    is_path = os.sep in command
    if not is_path and importlib.util.find_spec("mergekit") is not None:
        return
    found = shutil.which(command)
    if found is None or Path(found).absolute().parent == here:
        return
    python = Path(found).absolute().with_name("python")
    if not Path(found).name.startswith("mergekit-") or not python.exists():
        return
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    if subprocess.run([python, "-c", code, "mergekit", "pymerge"], check=False).returncode:
        raise BackendError(
            f"{found} belongs to an environment without pymerge; install pymerge there: "
            f"`{python} -m pip install pymerge-engine`"
        )
    os.execv(python, [str(python), "-m", "pymerge.cli", *sys.argv[1:]])


def _script(name: str) -> Any:
    scripts = {
        point.name: point
        for point in importlib.metadata.distribution("mergekit").entry_points
        if point.group == "console_scripts"
    }
    if name not in scripts:
        near = nearest(name, scripts)
        hint = "" if near is None else f"; did you mean {near}?"
        raise RecipeError(
            f"run: expected a command of mergekit ({listed(sorted(scripts))}), found "
            f"{shown(name)}{hint}"
        )
    return scripts[name]
