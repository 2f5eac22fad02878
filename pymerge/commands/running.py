"""Running a command: an error of ours becomes a message and an exit code."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from typing import Any, NoReturn

import typer

from pymerge.commands.options import Debug
from pymerge.errors import PymergeError

INTERRUPTED = 130


def run_app(app: typer.Typer) -> None:
    """Run the command that the program's arguments name, and leave the program."""
    # The search for pydantic's plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # the option parser turns Ctrl-C into this
            _fail("interrupted", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
    except PymergeError as error:
        if Debug.shown:
            traceback.print_exc()
        _fail(f"error: {error}", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os._exit(141)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        _show_usage_error(error)
        _show_missing_extension(error)
        raise


def leave(code: int) -> NoReturn:
    """End the program without taking apart what it imported, which takes as long as a small merge
    where torch is among it: what was registered for the end runs, and output is flushed."""
    if any(not t.daemon for t in threading.enumerate() if t is not threading.current_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _show_usage_error(error: Any) -> None:
    """A mistake in the options themselves, which the option parser words."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        sys.exit(error.exit_code)


def _show_missing_extension(error: Exception) -> None:
    """An installation whose native part cannot be loaded: the doctor knows why."""
    if not isinstance(error, ImportError) or Debug.shown:
        return
    from pymerge.doctor import examine

    problems = examine().problems
    if problems:
        _fail(f"error: {'; '.join(problems)}", PymergeError.exit_code)


def _fail(message: str, code: int) -> None:
    typer.echo(message, err=True)
    sys.exit(code)
