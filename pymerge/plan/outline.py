"""Which tensors the output has, and from which tensor of which model each is made.

The output has every tensor that the donor has, in the donor's order: names come from the
checkpoints, not from a list of known architectures. With ``slices`` the layers are those the slices
name, numbered anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint, TensorEntry, is_head
from pymerge.errors import PlanError
from pymerge.plan.layers import LayerStack, embedding_of, is_before_layers
from pymerge.recipe import ModelRef, OutputSlice, Recipe, SliceSource, position


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
    None. ``untied`` says that the output has a head of its own, which is not its embedding.
    ``dropped`` names tensors that inputs have and the output has not.
    """

    lines: tuple[Line, ...]
    num_layers: int | None
    layer_sources: tuple[int, ...] | None
    untied: bool
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
            self._is_untied(lines),
            self._dropped(lines),
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
        if is_head(name) and checkpoint.tied_embeddings:  # whatever else is stored, loaders tie it
            entry = embedding_of(checkpoint) or entry
        return Input(source, name, entry)

    def _separate_head(self, donor: Checkpoint) -> Line | None:
        """An output head for a donor that ties it, where any other model has one of its own."""
        if any(is_head(name) for name in donor.tensors) or not donor.tied_embeddings:
            return None
        own = (
            name
            for model in self.recipe.models
            if not self.checkpoints[model].tied_embeddings
            for name in self.checkpoints[model].tensors
            if is_head(name)
        )
        name = next(own, None)
        if name is None:
            return None
        part = self.slices[-1]
        inputs = tuple(self._input(source, name) for source in part.sources)
        pattern = next((i.entry for i in inputs if i.entry is not None), None)
        return None if pattern is None else Line(name, pattern, part, inputs, 0.0)

    def _is_untied(self, lines: Sequence[Line]) -> bool:
        """Whether the head that is written is not the embedding that is written."""
        heads = [line for line in lines if is_head(line.name)]
        embeddings = {line.pattern: line for line in lines if is_before_layers(line.name)}
        for head in heads:
            for each in head.inputs:
                checkpoint = self.checkpoints[each.source.model]
                if not checkpoint.tied_embeddings:
                    return True
                line = embeddings.get(embedding_of(checkpoint))  # type: ignore[arg-type]
                if line is not None and line.slice != head.slice:
                    return True
        return False

    def _layer_sources(self) -> tuple[int, ...]:
        layers: list[int] = []
        for part in self.slices:
            source = self._pattern_source(part)
            layers += range(source.start, source.start + (part.num_layers or 0))
        return tuple(layers)

    def _dropped(self, lines: Sequence[Line]) -> tuple[str, ...]:
        """Tensors that only other models have: they have no place in the donor's architecture."""
        used = {(i.source.model, i.name) for line in lines for i in line.inputs}
        written = {line.name for line in lines}
        return tuple(
            dict.fromkeys(
                f"{source.model}: {name}"
                for part in self.slices
                for source in part.sources
                for name in self.checkpoints[source.model].tensors
                if (source.model, name) not in used and self._takes_part(source, name, written)
            )
        )

    def _takes_part(self, source: SliceSource, name: str, written: set[str]) -> bool:
        """Whether a tensor that was not used is among what its model was named for."""
        stack = self.stacks[source.model]
        layer = None if stack is None else stack.split(name)
        if layer is None:
            return name not in written  # another slice may give it
        return source.stop is not None and source.start <= layer[0] < source.stop


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
