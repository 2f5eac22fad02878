"""Which tensors the output has, and from which tensor of which model each is made.

The output has every tensor that the donor has, in the donor's order: names come from the
checkpoints, not from a list of known architectures. With ``slices`` the layers are those the slices
name, numbered anew. Tensors of modules that a recipe with modules does not name are the donor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pymerge.checkpoint import Checkpoint, TensorEntry, is_head
from pymerge.plan.layers import (
    LayerStack,
    embedding_of,
    find_stacks,
    is_before_layers,
    layer_prefix,
)
from pymerge.plan.modules import Part, Parts, Role, role_of
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
    Without inputs it is copied.
    """

    name: str
    pattern: TensorEntry
    slice: OutputSlice
    inputs: tuple[Input, ...]
    t: float


@dataclass(frozen=True)
class Rebuilt:
    """A layer stack that slices rebuilt: the donor-side layer of each output layer.

    ``role`` is the part of the model that it belongs to, None for that of the whole model;
    ``num_before`` is how many layers the donor has.
    """

    role: Role | None
    num_before: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """The lines in output order, and what follows for the configuration.

    ``untied`` says that the output has a head of its own, which is not its embedding. ``dropped``
    names tensors that inputs have and the output has not.
    """

    lines: tuple[Line, ...]
    rebuilt: tuple[Rebuilt, ...]
    untied: bool
    dropped: tuple[str, ...]


class _Outliner:
    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[ModelRef, Checkpoint],
    ) -> None:
        self.recipe = recipe
        self.checkpoints = checkpoints
        self.donor = checkpoints[recipe.donor]
        self.parts = Parts(recipe, checkpoints)
        self.all_stacks = find_stacks(self.donor.tensors)

    def outline(self) -> Outline:
        lines: list[Line] = []
        done: set[Part] = set()
        for name, entry in self.donor.tensors.items():
            whole = self.parts.owner(name)
            if whole is None:
                lines.append(Line(name, entry, self.parts.parts[0].slices[0], (), 0.0))
                continue
            stack = whole.stacks[self.recipe.donor]
            if stack is not None and stack.split(name) is not None:
                if whole not in done:
                    lines += self._layers(whole, stack)
                    done.add(whole)
            else:
                line = self._outside(whole, name)
                if line is not None:
                    lines.append(line)
        head = self._separate_head()
        if head is not None:
            lines.append(head)
        rebuilt = [self._rebuilt(whole) for whole in self.parts.parts]
        return Outline(
            tuple(lines),
            tuple(each for each in rebuilt if each is not None),
            self._is_untied(lines),
            self._dropped(lines),
        )

    def _layers(self, whole: Part, stack: LayerStack) -> list[Line]:
        """The layers of all slices of a module, numbered consecutively."""
        lines = []
        number = 0
        for part in whole.slices:
            count = part.num_layers or 0
            pattern = self._pattern_source(part)
            inside = _by_layer(self.checkpoints[pattern.model], whole.stacks[pattern.model])
            for layer in range(count):
                t = position(layer, count)
                for rest, entry in inside.get(pattern.start + layer, {}).items():
                    inputs = tuple(
                        self._input(source, _layer_name(whole, source, layer, rest))
                        for source in part.sources
                    )
                    name = stack.join(number + layer, rest)
                    lines.append(Line(name, entry, part, inputs, t))
            number += count
        return lines

    def _outside(self, whole: Part, name: str) -> Line | None:
        """A tensor outside the module's layers: of the first slice before them, of the last after
        them. Whole models may have further layers, which have gradients of their own."""
        part = whole.slices[0] if is_before_layers(name) else whole.slices[-1]
        t = self._position(name) if whole.module.whole_models else 0.0
        inputs = tuple(self._input(source, name) for source in part.sources)
        pattern = self._pattern_source(part)
        entry = next((i.entry for i in inputs if i.source.model == pattern.model), None)
        entry = entry or self.donor.tensors.get(name)
        return None if entry is None else Line(name, entry, part, inputs, t)

    def _position(self, name: str) -> float:
        stack = self.all_stacks.get(layer_prefix(name) or "")
        found = None if stack is None else stack.split(name)
        return 0.0 if stack is None or found is None else position(found[0], stack.num_layers)

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

    def _separate_head(self) -> Line | None:
        """An output head for a donor that ties it, where any other model has one of its own."""
        donor = self.donor
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
        whole = None if name is None else self.parts.owner(name)
        if name is None or whole is None:
            return None
        part = whole.slices[-1]
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

    def _rebuilt(self, whole: Part) -> Rebuilt | None:
        stack = whole.stacks[self.recipe.donor]
        if whole.module.whole_models or stack is None:
            return None
        layers: list[int] = []
        for part in whole.slices:
            source = self._pattern_source(part)
            layers += range(source.start, source.start + (part.num_layers or 0))
        role = None if whole.module.name is None else role_of(stack.prefix)
        return Rebuilt(role, stack.num_layers, tuple(layers))

    def _dropped(self, lines: Sequence[Line]) -> tuple[str, ...]:
        """Tensors that only other models have: they have no place in the donor's architecture."""
        used = {(i.source.model, i.name) for line in lines for i in line.inputs}
        written = {line.name for line in lines}
        return tuple(
            dict.fromkeys(
                f"{source.model}: {name}"
                for whole in self.parts.parts
                for part in whole.slices
                for source in part.sources
                for name in self.checkpoints[source.model].tensors
                if (source.model, name) not in used
                and self.parts.owner(name) is whole
                and _takes_part(whole, source, name, written)
            )
        )


def _layer_name(whole: Part, source: SliceSource, layer: int, rest: str) -> str:
    stack = whole.stacks[source.model] or LayerStack("", 0)
    return stack.join(source.start + layer, rest)


def _takes_part(whole: Part, source: SliceSource, name: str, written: set[str]) -> bool:
    """Whether a tensor that was not used is among what its model was named for."""
    stack = whole.stacks[source.model]
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


def make_outline(recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint]) -> Outline:
    """The output's tensors and their sources.

    :raises PlanError: the models have not the modules or the layers that the recipe names.
    """
    return _Outliner(recipe, checkpoints).outline()
