"""The parts of a model of several: which tensor belongs to which module of a recipe.

The names of modules are those that mergekit gives (``text_decoder``, ``vision_tower``, ...), told
by the components of tensor names and not by a list of architectures. Any other name is a prefix of
tensor names, with or without ``model.`` before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pymerge.checkpoint import Checkpoint
from pymerge.errors import PlanError
from pymerge.names import listed, nearest
from pymerge.plan.layers import LayerStack, find_stack
from pymerge.recipe import ModelRef, OutputSlice, Recipe, RecipeModule, expand

Role = Literal["text", "vision", "audio", "projector", "encoder", "decoder"]

#: mergekit's names. ``shared`` is what an encoder-decoder has beside both; ``default`` is what no
#: other module of the recipe has.
ROLES: Mapping[str, Role] = {
    "text_decoder": "text",
    "vision_tower": "vision",
    "vision_model": "vision",
    "multi_modal_projector": "projector",
    "encoder": "encoder",
    "decoder": "decoder",
    "shared": "text",
}
DEFAULT = "default"

#: Components near the start of a tensor's name that tell its part, the first kind that fits.
_COMPONENTS: Mapping[Role, frozenset[str]] = {
    "projector": frozenset(
        {
            "multi_modal_projector",
            "mm_projector",
            "connector",
            "merger",
            "deepstack_merger_list",
            "embed_vision",
            "embed_audio",
        }
    ),
    "vision": frozenset({"vision_tower", "vision_model", "vision_encoder", "visual"}),
    "audio": frozenset({"audio_tower", "audio_model", "audio_encoder"}),
}
_NUM_COMPONENTS = 3


def role_of(name: str) -> Role:
    """The part of a model that a tensor belongs to by its name."""
    components = name.removeprefix("model.").split(".")
    for role, words in _COMPONENTS.items():
        if not words.isdisjoint(components[:_NUM_COMPONENTS]):
            return role
    if components[0] in ("encoder", "decoder"):
        return "encoder" if components[0] == "encoder" else "decoder"
    return "text"


@dataclass(frozen=True, eq=False)
class Part:
    """A module of the recipe in its models: its slices and, by model, its layer stack."""

    module: RecipeModule
    slices: tuple[OutputSlice, ...]
    stacks: Mapping[ModelRef, LayerStack | None]


class Parts:
    """The modules of a recipe over the tensors of its models."""

    def __init__(self, recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint]) -> None:
        """:raises PlanError: a module has no tensor, or layers that the recipe asks for."""
        self._names = [module.name for module in recipe.modules]
        donor = checkpoints[recipe.donor]
        owned = {self._owner(name) for name in donor.tensors}
        for number, module in enumerate(recipe.modules):
            if number not in owned:
                raise PlanError(_no_tensors(module, recipe.donor, donor))
        self.parts = tuple(
            self._part(module, number, recipe, checkpoints)
            for number, module in enumerate(recipe.modules)
        )

    def owner(self, name: str) -> Part | None:
        """The part that a tensor belongs to, None where the recipe names no such module."""
        number = self._owner(name)
        return None if number is None else self.parts[number]

    def _owner(self, name: str) -> int | None:
        best: tuple[int, int] | None = None
        for number, module in enumerate(self._names):
            fit = _fit(module, name)
            if fit is not None and (best is None or fit > best[0]):
                best = (fit, number)
        return None if best is None else best[1]

    def _part(
        self,
        module: RecipeModule,
        number: int,
        recipe: Recipe,
        checkpoints: Mapping[ModelRef, Checkpoint],
    ) -> Part:
        stacks = {}
        for ref, checkpoint in checkpoints.items():
            if module.name is None:
                stacks[ref] = find_stack(checkpoint)
            else:
                names = [name for name in checkpoint.tensors if self._owner(name) == number]
                stacks[ref] = find_stack(checkpoint, names)
        if not module.whole_models and stacks[recipe.donor] is None:
            what = "tensor" if module.name is None else f"tensor of its module {module.name}"
            raise PlanError(
                f"{module.place}: the recipe names slices of layers, but no {what} of "
                f"{recipe.donor} has a layer number in its name; use models instead of slices"
            )
        counts = {ref: stack.num_layers if stack else None for ref, stack in stacks.items()}
        return Part(module, tuple(expand(module, counts)), stacks)


def _fit(module: str | None, name: str) -> int | None:
    """How well a tensor fits a module, None for not at all: a longer prefix fits better."""
    if module is None or module == DEFAULT:
        return 0
    if module in ROLES:
        return 1 if role_of(name) == ROLES[module] else None
    for prefix in (f"{module}.", f"model.{module}."):
        if name.startswith(prefix):
            return len(prefix)
    return None


def _no_tensors(module: RecipeModule, donor: ModelRef, checkpoint: Checkpoint) -> str:
    found = {role_of(name) for name in checkpoint.tensors}
    names = {name for name, role in ROLES.items() if role in found}
    if not found & {"encoder", "decoder"}:
        names -= {"shared"}
    elif "vision" not in found:
        names -= {"text_decoder"}
    match = nearest(str(module.name), names)
    hint = f"; did you mean {match!r}?" if match else ";"
    return (
        f"{module.place}: no tensor of {donor} belongs to the module {module.name!r}{hint} its "
        f"tensors belong to {listed(names)}; {DEFAULT} is what no other module has, and any "
        "prefix of tensor names is a module, too"
    )
