"""Which tensors the output has, and from which tensor of which model each is made.

The output has every tensor that the donor has, in the donor's order: names come from the
checkpoints, not from a list of known architectures. With ``slices`` the layers are those the slices
name, numbered anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint, TensorEntry
from pymerge.errors import PlanError
from pymerge.plan.layers import LayerStack, is_before_layers
from pymerge.recipe import ModelRef, OutputSlice, Recipe, SliceSource, position

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Input:
    """One source of an output tensor; ``entry`` None where the model has no such tensor."""

    source: SliceSource
    name: str
    entry: TensorEntry | None


@dataclass(frozen=True)
class Line:
    """One output tensor: its inputs in the order of the slice, and its position in gradients.

    ``pattern`` is the tensor as the slice's first donor has it: it fixes shape and default format.
    """

    name: str
    pattern: TensorEntry
    slice: OutputSlice
    inputs: tuple[Input, ...]
    t: float


@dataclass(frozen=True)
class Outline:
    """The lines in output order, and what follows for the configuration.

    ``layer_sources`` is the donor-side layer of each output layer where slices rebuilt them, else
    None. ``dropped`` names tensors that inputs have and the output has not.
    """

    lines: tuple[Line, ...]
    num_layers: int | None
    layer_sources: tuple[int, ...] | None
    head_added: bool
    dropped: tuple[str, ...]


class _Outliner:
    def __init__(
        self,
        recipe: Recipe,
        slices: Sequence[OutputSlice],
        checkpoints: Mapping[ModelRef, Checkpoint],
        stacks: Mapping[ModelRef, LayerStack | None],
    ) -> None:
        self.recipe = recipe
        self.slices = slices
        self.checkpoints = checkpoints
        self.stacks = stacks

    def outline(self) -> Outline:
        donor = self.checkpoints[self.recipe.donor]
        stack = self.stacks[self.recipe.donor]
        lines: list[Line] = []
        layers_done = False
        for name in donor.tensors:
            if stack is not None and stack.split(name) is not None:
                if not layers_done:
                    lines += self._layers(stack)
                    layers_done = True
            else:
                line = self._outside(name)
                if line is not None:
                    lines.append(line)
        head = self._separate_head(donor)
        if head is not None:
            lines.append(head)
        rebuilt = not self.recipe.whole_models and stack is not None
        sources = self._layer_sources() if rebuilt else None
        return Outline(
            tuple(lines),
            None if sources is None else len(sources),
            sources,
            head is not None,
            self._dropped({line.name for line in lines}, lines),
        )

    def _layers(self, stack: LayerStack) -> list[Line]:
        """The layers of all slices, numbered consecutively."""
        lines = []
        number = 0
        for part in self.slices:
            count = part.num_layers or 0
            pattern = self._pattern_source(part)
            inside = _by_layer(self.checkpoints[pattern.model], self.stacks[pattern.model])
            for layer in range(count):
                t = position(layer, count)
                for rest, entry in inside.get(pattern.start + layer, {}).items():
                    inputs = tuple(
                        self._input(source, self._layer_name(source, layer, rest))
                        for source in part.sources
                    )
                    name = stack.join(number + layer, rest)
                    lines.append(Line(name, entry, part, inputs, t))
            number += count
        return lines

    def _layer_name(self, source: SliceSource, layer: int, rest: str) -> str:
        stack = self.stacks[source.model]
        prefix = stack if stack is not None else LayerStack("", 0)
        return prefix.join(source.start + layer, rest)

    def _outside(self, name: str) -> Line | None:
        """A tensor outside the layers: of the first slice before them, of the last after them."""
        part = self.slices[0] if is_before_layers(name) else self.slices[-1]
        inputs = tuple(self._input(source, name) for source in part.sources)
        pattern = self._pattern_source(part)
        entry = next((i.entry for i in inputs if i.source.model == pattern.model), None)
        entry = entry or self.checkpoints[self.recipe.donor].tensors.get(name)
        return None if entry is None else Line(name, entry, part, inputs, 0.0)

    def _pattern_source(self, part: OutputSlice) -> SliceSource:
        """The source whose tensor names a slice follows: the donor's where it takes part."""
        for model in (part.base, self.recipe.donor):
            for source in part.sources:
                if source.model == model:
                    return source
        return part.sources[0]

    def _input(self, source: SliceSource, name: str) -> Input:
        checkpoint = self.checkpoints[source.model]
        entry = checkpoint.tensors.get(name)
        if entry is None and name.endswith(_HEAD) and checkpoint.tied_embeddings:
            entry = _embedding(checkpoint)
        return Input(source, name, entry)

    def _separate_head(self, donor: Checkpoint) -> Line | None:
        """An output head for a donor that ties it, where another model has one of its own."""
        if any(name.endswith(_HEAD) for name in donor.tensors):
            return None
        part = self.slices[-1]
        heads = {
            name: entry
            for source in part.sources
            for name, entry in self.checkpoints[source.model].tensors.items()
            if name.endswith(_HEAD)
        }
        if not heads or not donor.tied_embeddings:
            return None
        name = next(iter(heads))
        inputs = tuple(self._input(source, name) for source in part.sources)
        return Line(name, heads[name], part, inputs, 0.0)

    def _layer_sources(self) -> tuple[int, ...]:
        layers: list[int] = []
        for part in self.slices:
            source = self._pattern_source(part)
            layers += range(source.start, source.start + (part.num_layers or 0))
        return tuple(layers)

    def _dropped(self, written: set[str], lines: Sequence[Line]) -> tuple[str, ...]:
        """Tensors that only other models have: they have no place in the donor's architecture."""
        if not self.recipe.whole_models:
            return ()
        used = {(i.source.model, i.name) for line in lines for i in line.inputs}
        return tuple(
            f"{model}: {name}"
            for model in self.recipe.models
            if any(source.model == model for source in self.slices[0].sources)
            for name in self.checkpoints[model].tensors
            if name not in written and (model, name) not in used
        )


def _by_layer(
    checkpoint: Checkpoint, stack: LayerStack | None
) -> dict[int, dict[str, TensorEntry]]:
    """Layer → remaining name → tensor, in the checkpoint's order."""
    layers: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in checkpoint.tensors.items() if stack is not None else ():
        found = stack.split(name) if stack is not None else None
        if found is not None:
            layers.setdefault(found[0], {})[found[1]] = entry
    return layers


def _embedding(checkpoint: Checkpoint) -> TensorEntry | None:
    for name, entry in checkpoint.tensors.items():
        if name.endswith(_EMBEDDINGS):
            return entry
    return None


def make_outline(
    recipe: Recipe,
    slices: Sequence[OutputSlice],
    checkpoints: Mapping[ModelRef, Checkpoint],
    stacks: Mapping[ModelRef, LayerStack | None],
) -> Outline:
    """The output's tensors and their sources.

    :raises PlanError: a recipe with slices over models without numbered layers.
    """
    if not recipe.whole_models and stacks[recipe.donor] is None:
        raise PlanError(
            f"the recipe names slices of layers, but no tensor of {recipe.donor} has a "
            "layer number in its "
            "name; use models instead of slices"
        )
    return _Outliner(recipe, slices, checkpoints, stacks).outline()
