"""What mergekit's options mean for our engine, under the names of ``mergekit.options``.

``pymerge-yaml`` and what stands in for mergekit's ``run_merge`` share it; mergekit is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pymerge.errors import BackendError, PlanError, PymergeError
from pymerge.names import shown

if TYPE_CHECKING:
    from pymerge.plan import Plan
    from pymerge.recipe import Recipe

RECIPE_NAME = "mergekit_config.yml"
CARD_NAME = "README.md"

#: Options without effect: what is said where one is given.
_WITHOUT_EFFECT: Mapping[str, str] = {
    "trust_remote_code": "no code of a model is run",
    "lora_merge_cache": "adapters are put on their base tile by tile, nothing is kept",
    "lora_merge_dtype": "adapters are put on their base in float32",
    "low_cpu_memory": "memory is bounded by --memory",
    "read_to_gpu": "inputs are streamed through a pool of host buffers",
    "multi_gpu": "a backend of GPUs uses all that are visible",
    "async_write": "reading, computing and writing always overlap",
    "write_threads": "reading, computing and writing always overlap",
    "clone_tensors": "every tensor is written on its own",
}


def notes(given: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each option that was given and has no effect."""
    for name, reason in _WITHOUT_EFFECT.items():
        if given.get(name) not in (None, False):
            yield f"--{name.replace('_', '-')} has no effect: {reason}"


def backends(device: str | None, cuda: bool, backend: str | None) -> tuple[str | None, ...]:
    """The backends to try in turn; None is the choice of the engine.

    :raises PymergeError: a device that there is no backend for.
    """
    if backend is not None:
        return (backend,)
    if device is None:
        device = "cuda" if cuda else "auto"
    if device == "auto":
        return (None,)
    if device == "cpu":
        return ("cpu",)
    if device == "cuda":
        return ("cuda", "triton")
    hint = ""
    if device.startswith("cuda:"):
        number = device.removeprefix("cuda:")
        hint = f"; to choose a GPU, set CUDA_VISIBLE_DEVICES={number} and give --device cuda"
    raise PymergeError(f"--device: expected cpu, cuda or auto, found {shown(device)}{hint}")


def plan_on(recipe: Recipe, backends: tuple[str | None, ...], planning: dict[str, Any]) -> Plan:
    """The plan with the first of the backends that can run here.

    :raises BackendError: none can.
    """
    from pymerge import api

    reasons = []
    for backend in backends:
        try:
            return api.plan(recipe, backend=backend, **planning)
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("; ".join(reasons))


def check_architectures(recipe: Recipe, planned: Plan) -> None:
    """:raises PlanError: the models are of different architectures."""
    found: dict[str, str] = {}
    for ref in recipe.models:
        named = (planned.checkpoints[str(ref)].config or {}).get("architectures")
        if ref.override_architecture is not None:
            found.setdefault(ref.override_architecture, str(ref))
        elif isinstance(named, list) and named:
            found.setdefault(", ".join(map(str, named)), str(ref))
    if len(found) > 1:
        each = "; ".join(f"{model}: {architecture}" for architecture, model in found.items())
        raise PlanError(
            f"expected models of one architecture, found {each}. Give --allow-crimes to merge "
            "them by the names of their tensors"
        )


def files_beside(
    recipe: Recipe, planned: Plan, *, card: bool, tokenizer: bool, source: bytes
) -> dict[str, bytes]:
    """The files beside the weights that the options leave; ``source`` is the recipe as written."""
    from pymerge.checkpoint.sidefiles import TOKENIZER_NAMES
    from pymerge.engine import side_files

    unwanted = [] if card else [CARD_NAME]
    if not tokenizer and recipe.tokenizer is None:  # one that the recipe makes is always written
        unwanted += [*TOKENIZER_NAMES, "additional_chat_templates"]
    files = side_files(planned)
    files = {name: data for name, data in files.items() if name.partition("/")[0] not in unwanted}
    return {**files, RECIPE_NAME: source} if card else files
