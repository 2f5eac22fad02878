"""pymerge: merge the weights of fine-tuned models, streamed, resumable, deterministic to the
bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge._version import __version__
from pymerge.errors import (
    BackendError,
    CheckpointError,
    InterruptedMerge,
    PlanError,
    PymergeError,
    RecipeError,
    StorageError,
)

if TYPE_CHECKING:
    from pymerge import methods
    from pymerge.adaptive.collect import collect
    from pymerge.adaptive.regmean_plus_plus import regmean_plus_plus
    from pymerge.api import explain, load_recipe, merge, plan, push, verify
    from pymerge.engine.run import MergeReport
    from pymerge.in_memory import merge_tensor
    from pymerge.lora.combine import combine_lora
    from pymerge.lora.extract import extract_lora
    from pymerge.multi import merge_documents
    from pymerge.raw import merge_raw
    from pymerge.runtime.load import load_task
    from pymerge.runtime.materialize import materialize
    from pymerge.runtime.smile import load_smile
    from pymerge.session import Session
    from pymerge.state_dicts import merge_state_dicts
    from pymerge.surveys import survey

__all__ = [
    "BackendError",
    "CheckpointError",
    "InterruptedMerge",
    "MergeReport",
    "PlanError",
    "PymergeError",
    "RecipeError",
    "Session",
    "StorageError",
    "__version__",
    "collect",
    "combine_lora",
    "explain",
    "extract_lora",
    "load_recipe",
    "load_smile",
    "load_task",
    "materialize",
    "merge",
    "merge_documents",
    "merge_raw",
    "merge_state_dicts",
    "merge_tensor",
    "methods",
    "plan",
    "push",
    "regmean_plus_plus",
    "survey",
    "verify",
]

# Loaded on first use, so that `import pymerge` and `pymerge --help` cost nothing.
_HOMES = {
    "collect": ("pymerge.adaptive.collect", "collect"),
    "regmean_plus_plus": ("pymerge.adaptive.regmean_plus_plus", "regmean_plus_plus"),
    "combine_lora": ("pymerge.lora.combine", "combine_lora"),
    "explain": ("pymerge.api", "explain"),
    "extract_lora": ("pymerge.lora.extract", "extract_lora"),
    "load_recipe": ("pymerge.api", "load_recipe"),
    "merge": ("pymerge.api", "merge"),
    "merge_documents": ("pymerge.multi", "merge_documents"),
    "merge_raw": ("pymerge.raw", "merge_raw"),
    "plan": ("pymerge.api", "plan"),
    "push": ("pymerge.api", "push"),
    "survey": ("pymerge.surveys", "survey"),
    "verify": ("pymerge.api", "verify"),
    "merge_tensor": ("pymerge.in_memory", "merge_tensor"),
    "merge_state_dicts": ("pymerge.state_dicts", "merge_state_dicts"),
    "Session": ("pymerge.session", "Session"),
    "load_smile": ("pymerge.runtime.smile", "load_smile"),
    "load_task": ("pymerge.runtime.load", "load_task"),
    "materialize": ("pymerge.runtime.materialize", "materialize"),
    "MergeReport": ("pymerge.engine.run", "MergeReport"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "methods":
        return import_module("pymerge.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
