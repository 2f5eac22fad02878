"""Every exception that pymerge raises on purpose, under one base class.

A message says what was expected, what was found, where (model, tensor, file, field) and what to do.
The command line prints it without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations


class PymergeError(Exception):
    """Base of all errors that a user can cause or mend."""

    exit_code = 2


class RecipeError(PymergeError):
    """The recipe does not say what to merge: a key, method, parameter, filter or model is wrong."""


class CheckpointError(PymergeError):
    """A checkpoint on disk is not what it claims to be, or cannot be read as one."""


class PlanError(PymergeError):
    """Recipe and checkpoints are each valid but do not fit together, or not into the memory
    given."""


class BackendError(PymergeError):
    """A backend or instruction set was asked for by name and cannot run here."""


class StorageError(PymergeError):
    """Reading or writing failed: no space, an I/O error, a file that changed under us."""

    exit_code = 3


class InterruptedMerge(PymergeError):
    """The merge was stopped by a signal; the output folder holds a resumable state."""

    exit_code = 130
