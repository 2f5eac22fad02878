"""The form of every merge method: measure → decide → apply.

A method is a function of one :class:`Tensor`. Where it needs statistics it is a generator: each
``yield Measure(...)`` asks for one look at the tensor's tiles and receives what was measured; it
returns an :class:`Apply`, the map that the engine runs over the tiles to produce the output. A
method without statistics is a plain function that returns its ``Apply``. It never opens a file,
names a device, starts a thread or allocates an output.

A method that looks at a tensor as a matrix says by ``cost`` what that takes. It gathers the matrix
in its workspace by looks, and asks by ``yield Solve(...)`` for work on whole matrices; by ``yield
Factors()`` for the factors of models that are adapters, and by ``yield Statistic(...)`` for what
was collected beside a model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from pymerge.formats import F32, Format
from pymerge.methods.spec import MethodSpec, ParameterValue
from pymerge.ops.opset import OpSet
from pymerge.ops.view import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pymerge.ops.workspace import Workspace

Answer = TypeVar("Answer")
Asked = TypeVar("Asked")


class Tile(NamedTuple):
    """A run of consecutive elements of one tensor, of every input, in memory.

    ``start`` is the index of its first element in the full tensor, so that results cannot depend on
    how the tensor was cut. ``diagonals`` are the models' statistics of the same shape, for a method
    that reads them.
    """

    start: int
    num: int
    base: View | None
    models: tuple[View, ...]
    diagonals: tuple[View, ...] = ()

    @property
    def views(self) -> tuple[View, ...]:
        """The base where there is one, then the models, then the diagonals."""
        models = (*self.models, *self.diagonals)
        return models if self.base is None else (self.base, *models)

    def at(self, views: Sequence[View]) -> Tile:
        """The same tile in other memory; ``views`` in the order of :attr:`views`."""
        base, rest = (None, views) if self.base is None else (views[0], views[1:])
        num = len(self.models)
        return self._replace(base=base, models=tuple(rest[:num]), diagonals=tuple(rest[num:]))

    def of_models(self, models: Sequence[int] | None) -> Tile:
        """The same tile with the models of these indices alone, and without diagonals; as it is
        where ``models`` is None."""
        if models is None:
            return self
        return self._replace(models=tuple(self.models[index] for index in models), diagonals=())

    def part(self, first: int, num: int) -> Tile:
        """``num`` of the tile's elements from its element ``first`` on."""
        return Tile(
            self.start + first,
            num,
            None if self.base is None else self.base.part(first, num),
            tuple(model.part(first, num) for model in self.models),
            tuple(diagonal.part(first, num) for diagonal in self.diagonals),
        )

    def pieces(self, size: int) -> Iterator[tuple[int, Tile]]:
        """The tile cut into pieces of ``size`` elements, the last one shorter, each with the index
        of its first element in the tile: for steps that need scratch memory of their own."""
        for first in range(0, self.num, size):
            yield first, self.part(first, min(size, self.num - first))


@dataclass(frozen=True)
class Measure:
    """One look at the tiles: ``run(tile)`` on each, combined by ``fold``.

    ``fold`` must not depend on the order (integer sums); without it the answer is the list of
    results in tile order. ``only`` restricts the look to one tile. ``ordered`` looks at the tiles
    one after another in their order, for a ``run`` that adds to a running sum. ``models`` are the
    indices of the models to look at, the base always beside them: others are not read, and are not
    in the tile. ``within`` (first, number) restricts the look to tiles that hold elements of a run.
    """

    run: Callable[[Tile], Any]
    fold: Callable[[Any, Any], Any] | None = None
    only: int | None = None
    ordered: bool = False
    models: tuple[int, ...] | None = None
    within: tuple[int, int] | None = None


@dataclass(frozen=True)
class Solve:
    """Work on whole matrices in the tensor's workspace, answered by what ``run()`` returns."""

    run: Callable[[], Any]


@dataclass(frozen=True)
class Factors:
    """Ask for the models' task vectors as products, answered by a list of (left [rows, rank],
    right [rank, columns]), float32 with every scale in them, one for each model; or by None where a
    model is not the base with a low-rank update on it."""


@dataclass(frozen=True)
class Statistic:
    """Ask for the Gram matrix of a model's inputs to this tensor, answered by float32
    [n (n + 1) / 2], its lower triangle row by row."""

    model: int


@dataclass(frozen=True)
class EachTensor:
    """In a model-wide measurement: run a generator of questions for each tensor by itself, several
    tensors at once. Answered by a dict from tensor name to what it returned."""

    run: Callable[[Tensor], Generator[Question, Any, Any]]


Question = Measure | Solve | Factors | Statistic


class Store(Protocol):
    """Keeps arrays from a model-wide measurement until their tensor is merged."""

    def put(self, name: str, array: NDArray[np.generic]) -> None:
        """Keep an array."""

    def get(self, name: str) -> NDArray[np.generic]:
        """The array that was kept."""


class Cost(NamedTuple):
    """What merging one matrix takes beside its tiles.

    ``num_bytes`` is the most that its matrices hold at once; the flops are those of products in
    float32 and float64 and, as 9 n^3 each, of symmetric eigenproblems in float64. Without
    ``panels`` nothing is multiplied, so that no thread holds panels of rows.
    """

    num_bytes: int = 0
    flops32: float = 0.0
    flops64: float = 0.0
    eigen64: float = 0.0
    panels: bool = True


#: Of a tensor that is no matrix.
NO_COST = Cost()


class Folded:
    """The running fold of a look: results are combined as they come, not collected, since a tile's
    histogram may be larger than the tile. Any number of threads may add at once."""

    def __init__(self, run: Callable[[Tile], Any], fold: Callable[[Any, Any], Any]) -> None:
        self.value: Any = None
        self._run, self._fold = run, fold
        self._lock = threading.Lock()

    def add(self, tile: Tile) -> None:
        """Look at one tile."""
        result = self._run(tile)
        with self._lock:
            self.value = result if self.value is None else self._fold(self.value, result)


@dataclass(frozen=True)
class Apply:
    """The map that writes the output: ``run(tile, out)`` returns the count of non-finite
    elements.

    A method with extras gets ``run(tile, out, *extras)``, for each the views of its rows, and
    returns an :class:`Applied`. ``values`` makes of what was measured on the tiles, in their order,
    the numbers that are kept with the tensor. ``models`` are the indices of the models that the map
    reads beside the base: the others are not in its tiles. ``wholes`` are the extras with shapes of
    their own by their suffix, as the bytes of the output's format.
    """

    run: Callable[..., int | Applied]
    values: Callable[[Sequence[Any]], list[float]] | None = None
    models: tuple[int, ...] | None = None
    wholes: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


class Applied(NamedTuple):
    """What writing a tile found: non-finite elements of all outputs, and what was measured."""

    nonfinite: int
    measured: Any = None


class Extra(NamedTuple):
    """One more output of every merged tensor NAME: the tensor NAME.suffix beside the model.

    It has one row, or one for each model, along NAME's elements: with ``bits`` None a number in the
    output's format for each element, else so many bits (which divide 8), a byte's lowest first; a
    row begins with a byte. The shape is NAME's, [num_models, *NAME's], or of bits [num_models,
    bytes of a row] of U8. Rows come as views of bytes where there are bits. ``where`` tells which
    tensors have it, if not all.

    With ``shape`` it is a tensor of that shape in the output's format, or none where the function
    answers None; the method gives its bytes as a whole, in ``Apply.wholes``.
    """

    suffix: str
    per_model: bool
    bits: int | None
    shape: Callable[[Tensor], tuple[int, ...] | None] | None = None
    where: Callable[[Tensor], bool] | None = None

    def shape_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor's extra, None where it has none; bits are bytes."""
        if self.shape is not None:
            return self.shape(tensor)
        if self.where is not None and not self.where(tensor):
            return None
        rows = (tensor.num_models,) if self.per_model else ()
        if self.bits is None:
            return (*rows, *tensor.shape)
        return (
            tensor.num_models if self.per_model else 1,
            -(-tensor.num_elements * self.bits // 8),
        )


class Beside(NamedTuple):
    """A merged tensor that others stand beside: the numbers kept with it, and the shapes of the
    others by their suffix."""

    tensor: Tensor
    values: Sequence[float]
    shapes: Mapping[str, tuple[int, ...]]


class Description(NamedTuple):
    """The file that tells what stands beside a model.

    ``content(method, models, tensors, files)`` gives the object that it holds, of the names of the
    models, of the merged tensors that have extras and of the files that these are in. ``title`` and
    ``use`` say on the model's card what the folder is, before the list of the models.
    """

    file_name: str
    content: Callable[[Method, Sequence[str], Sequence[Beside], Sequence[str]], Mapping[str, Any]]
    title: str
    use: str


def _unheard(sentence: str) -> None:
    pass


@dataclass(frozen=True)
class Tensor:
    """What a method knows of one output tensor.

    ``parameters`` are the shared ones, ``model_parameters`` those of each model in order (the base
    excluded where the method has one). ``model_numbers`` are the models' positions in the recipe,
    which stay theirs where a tensor is merged without a model that lacks it. ``input_names`` are
    the names that the base and the models have for the tensor. ``state`` is what the
    method's model-wide measurement returned. ``transposed`` says that the tensor is stored as
    [inputs, outputs]. ``statistics`` are each model's numbers beside it (rows seen, the norm of the
    whole), for a method that reads statistics. ``format`` is the output's,
    ``working`` the one that mergekit would compute in. ``siblings`` are the shapes of the tensors
    of the same module, this one among them, by the last parts of their names. ``workspace`` and
    ``store`` are there while the tensor is merged, not while a plan is made; then ``warn`` takes
    sentences for the user about what was found in the tensor, which any thread may give. ``memory``
    is there where the same inputs are merged again, see :func:`remembered`.
    """

    name: str
    shape: tuple[int, ...]
    num_models: int
    has_base: bool
    parameters: Mapping[str, ParameterValue]
    model_parameters: Sequence[Mapping[str, ParameterValue]]
    ops: OpSet
    model_names: Sequence[str] = ()
    model_numbers: Sequence[int] = ()
    input_names: Sequence[str] = ()
    state: Any = None
    transposed: bool = False
    statistics: Sequence[float] = ()
    format: Format = F32
    working: Format = F32
    siblings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    workspace: Workspace | None = None
    store: Store | None = None
    memory: dict[Hashable, Any] | None = None
    warn: Callable[[str], None] = _unheard

    @property
    def room(self) -> Workspace:
        """The workspace of a tensor that is being merged."""
        if self.workspace is None:
            raise RuntimeError(f"{self.name}: matrices are not computed while a plan is made")
        return self.workspace

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Elements of a row: the last extent, 1 for a scalar. A vector is one row."""
        return max(1, self.shape[-1]) if self.shape else 1

    @property
    def num_rows(self) -> int:
        return self.num_elements // self.columns

    def each(self, parameter: str) -> list[float]:
        """The values of a numeric per-model parameter, in model order."""
        return [float(values[parameter]) for values in self.model_parameters]


#: Elements of a span: sums over a tensor are sums of its spans, whatever the tiles, which always
#: begin at a multiple of it unless the method asks for whole rows.
SPAN = 4096

Scales = Callable[[Sequence[Tensor], Sequence[Sequence[float]]], dict[str, float]]
Measuring = Generator[Measure, Any, Apply]
Solving = Generator[Question, Any, Apply]
ModelMeasuring = Generator[Measure | EachTensor, Any, Any]


@dataclass(frozen=True)
class Method:
    """A registered method.

    ``merge`` is described in the module's docstring. ``measure_model``, where present and where
    ``model_wide(tensor)`` says so, runs before any tensor is merged: a generator over the list of
    all tensors whose ``Measure`` without ``fold`` is answered by a dict from tensor name to the
    list of tile results, and with ``fold`` by one value for the whole model. ``looks`` tells how
    often a tensor is measured, for the plan's estimate of what a streamed tensor costs; a look at
    some of its models counts for their share.
    ``granule`` is the number of elements that a tile holds a multiple of: a row's for methods that
    look at whole rows, else 1.

    ``check(tensors)`` objects to parameters that do not go together over a model, ``warnings``
    tells what they bring about unasked, in sentences for the plan. The output of a method with
    ``extras`` is a model with others beside it, which ``description`` describes; of one that gives
    a model for each task ``scales(tensors, values)`` makes of the numbers kept with each tensor a
    factor for each model.
    ``cost(tensor)`` is what a method of matrices takes for a tensor. ``reads`` names the statistics
    beside the models that it reads.
    """

    spec: MethodSpec
    merge: Callable[[Tensor], Apply | Measuring | Solving]
    ops: tuple[str, ...]
    looks: Callable[[Tensor], float] = field(default=lambda tensor: 0)
    model_wide: Callable[[Tensor], bool] = field(default=lambda tensor: False)
    measure_model: Callable[[Sequence[Tensor]], ModelMeasuring] | None = None
    model_looks: int = 0
    granule: Callable[[Tensor], int] = field(default=lambda tensor: 1)
    extras: tuple[Extra, ...] = ()
    check: Callable[[Sequence[Tensor]], None] = field(default=lambda tensors: None)
    scales: Scales | None = None
    cost: Callable[[Tensor], Cost] | None = None
    reads: Literal["gram", "fisher"] | None = None
    warnings: Callable[[Sequence[Tensor]], list[str]] = field(default=lambda tensors: [])
    description: Description | None = None


def decide(method: Method, tensor: Tensor, measure: Callable[[Any], Any]) -> Apply:
    """Run a method up to its ``Apply``, answering each question by ``measure``."""
    outcome = method.merge(tensor)
    if isinstance(outcome, Apply):
        return outcome
    apply: Apply = answer(outcome, measure)
    return apply


def answer(questions: Generator[Any, Any, Any], measure: Callable[[Any], Any]) -> Any:
    """Drive a generator of questions to its return value."""
    reply: Any = None
    while True:
        try:
            question = questions.send(reply)
        except StopIteration as stop:
            return stop.value
        # Both may hold matrices, which live no longer than they are needed.
        del reply
        reply = measure(question)
        # What it holds is free for the next one.
        del question


#: Answers that are kept for one tensor; the oldest is forgotten.
MEMORY_SIZE = 64


def remembered(
    tensor: Tensor,
    key: Hashable,
    questions: Callable[[], Generator[Asked, Any, Answer]],
) -> Generator[Asked, Any, Answer]:
    """What the generator ``questions()`` returns, which is asked once where the tensor has a
    memory.

    ``key`` holds everything beside the inputs that the answer depends on. What the generator
    returns is small, and nobody changes it.
    """
    memory = tensor.memory
    if memory is None:
        return (yield from questions())
    if key not in memory:
        found = yield from questions()
        if len(memory) >= MEMORY_SIZE:
            del memory[next(iter(memory))]
        memory[key] = found
    answer: Answer = memory[key]
    return answer
