"""Which tensors a method takes as matrices, and how: weights [outputs, inputs] as they act on
columns, one or several in a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pymerge.errors import RecipeError
from pymerge.methods.protocol import Tensor, Tile
from pymerge.methods.spec import ParameterSpec

#: Tables of vectors that are looked up, not multiplied by, kernels of convolutions, which lie like
#: a stack of matrices, biases of a stack, and projections out of the model: the reference code of
#: most methods leaves them out or would decompose them by accident.
NOT_MATRICES = (
    r"(^|\.)(embed_(tokens\w*|positions|in|out)|lm_head|wte|wpe|shared|text_projection|A_log|probe"
    r"|(\w+_)?embeddings?|pos_embed|\w+_token|relative_(attention_bias|position_bias_table)"
    r"|cls\.predictions\.decoder|\w*conv\d*d?\.(weight\w*|parametrizations))(\.|$)"
    r"|^(output|proj_out)\.weight$|bias$"
)

#: What the name of one of packed experts has behind that of the tensor.
_EXPERT = re.compile(r"\[\d+\]$")

EXCLUDE = ParameterSpec(
    "exclude",
    "str",
    "shared",
    NOT_MATRICES,
    "Regular expression: tensors with a match in their names are not taken as matrices.",
)
LAYERS = ParameterSpec(
    "layers",
    "str",
    "shared",
    "",
    "Regular expression: only tensors with a match in their names are taken as matrices.",
)
SPLIT = ParameterSpec(
    "split",
    "str",
    "shared",
    "",
    "Fused matrices that are taken apart, by a part of their names: `qkv_proj=3,gate_up_proj=2` in "
    "equal parts, `qkv_proj=4096:1024:1024` by their outputs.",
)
TRANSPOSE = ParameterSpec(
    "transpose",
    "str",
    "shared",
    "",
    "Regular expression: matrices stored as [inputs, outputs]. GPT-2's are known without it.",
)
LAYOUT = (LAYERS, EXCLUDE, SPLIT, TRANSPOSE)


@dataclass(frozen=True)
class Block:
    """A matrix within a tensor: a window of its stored rows and columns, all stored rows being
    ``width`` elements long; ``transposed`` where its outputs are columns."""

    first_row: int
    stored_rows: int
    first_column: int
    stored_columns: int
    width: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.stored_columns if self.transposed else self.stored_rows

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.stored_rows if self.transposed else self.stored_columns

    @property
    def num_elements(self) -> int:
        return self.stored_rows * self.stored_columns

    @property
    def is_contiguous(self) -> bool:
        return self.stored_columns == self.width

    @property
    def within(self) -> tuple[int, int]:
        """The run of the tensor's elements that holds it."""
        return self.first_row * self.width, self.stored_rows * self.width

    def runs(self, tile: Tile) -> Iterator[tuple[Tile, int]]:
        """The parts of a tile that lie in the window, each with the place of its first element
        among the window's, row by row."""
        first, num = self.within
        begin, end = max(tile.start, first), min(tile.start + tile.num, first + num)
        if begin >= end:
            return
        if self.is_contiguous:
            yield tile.part(begin - tile.start, end - begin), begin - first
            return
        for row in range((begin - first) // self.width, -(-(end - first) // self.width)):
            left = first + row * self.width + self.first_column
            low, high = max(begin, left), min(end, left + self.stored_columns)
            if low < high:
                yield (
                    tile.part(low - tile.start, high - low),
                    row * self.stored_columns + low - left,
                )


def blocks_of(tensor: Tensor) -> tuple[Block, ...]:
    """The matrices of a tensor, in the order of their rows; none where it is not one.

    A tensor [experts, m, n] holds a matrix for each expert.

    :raises RecipeError: a parameter of the layout is malformed or does not fit the tensor.
    """
    parameters, shape = tensor.parameters, tensor.shape
    if len(shape) not in (2, 3) or not tensor.num_elements:
        return ()
    if not _matches("layers", parameters["layers"], tensor.name):
        return ()
    if parameters["exclude"] and _matches("exclude", parameters["exclude"], tensor.name):
        return ()
    transposed = tensor.transposed
    if parameters["transpose"] and _matches("transpose", parameters["transpose"], tensor.name):
        transposed = True
    stored_rows, width = shape[-2:]
    outputs = width if transposed else stored_rows
    found = []
    for expert in range(shape[0] if len(shape) == 3 else 1):
        place = 0
        for part in _split(tensor, outputs):
            found.append(
                Block(expert * stored_rows, stored_rows, place, part, width, True)
                if transposed
                else Block(expert * stored_rows + place, part, 0, width, width)
            )
            place += part
    return tuple(found)


def unmatched(tensors: Sequence[Tensor]) -> list[str]:
    """What ``layers``, ``exclude``, ``split`` and ``transpose`` look for and do not find in the
    names of the tensors, and whether no tensor is taken as a matrix, in sentences."""
    found: dict[tuple[str, str], bool] = {}
    taken = 0
    tensors = [tensor for tensor in tensors if "layers" in tensor.parameters]
    for tensor in tensors:
        taken += bool(blocks_of(tensor))
        for name in ("layers", "exclude", "transpose"):
            pattern = str(tensor.parameters.get(name, ""))
            if pattern and pattern != NOT_MATRICES:
                key = name, pattern
                found[key] = found.get(key, False) or _matches(name, pattern, tensor.name)
        for entry in filter(None, str(tensor.parameters.get("split", "")).split(",")):
            key = "split", entry.partition("=")[0].strip()
            found[key] = found.get(key, False) or key[1] in tensor.name
    sentences = [
        f"{name}: no tensor has a match for {pattern!r} in its name"
        for (name, pattern), matched in found.items()
        if not matched
    ]
    if tensors and not taken:
        sentences.append(
            f"none of {len(tensors)} tensors is taken as a matrix, so that the method has no part "
            "in the result; see layers and exclude"
        )
    return sentences


def _matches(name: str, pattern: object, tensor: str) -> bool:
    """Patterns are for the names of whole tensors, of which one of packed experts is a part."""
    try:
        return re.search(str(pattern), _EXPERT.sub("", tensor)) is not None
    except re.error as error:
        raise RecipeError(
            f"{name}: expected a regular expression, found {pattern!r}: {error}"
        ) from None


def _split(tensor: Tensor, outputs: int) -> list[int]:
    """The outputs of each part of a fused matrix."""
    text = str(tensor.parameters.get("split", ""))
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, sizes = entry.partition("=")
        parts = sizes.split(":")
        if not name or not all(part.strip().isdecimal() and int(part) for part in parts):
            raise RecipeError(
                "split: expected names with counts or sizes, as in qkv_proj=3 or "
                f"qkv_proj=4096:1024:1024, found {entry!r}"
            )
        if name.strip() not in tensor.name:
            continue
        numbers = [int(part) for part in parts]
        if len(numbers) == 1 and outputs % numbers[0] == 0:
            return [outputs // numbers[0]] * numbers[0]
        if len(numbers) > 1 and sum(numbers) == outputs:
            return numbers
        raise RecipeError(
            f"split: {entry!r} does not fit tensor {tensor.name!r} with {outputs} outputs; give "
            "a divisor of it, or sizes that sum to it"
        )
    return [outputs]
