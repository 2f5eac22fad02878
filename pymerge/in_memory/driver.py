"""Drives a method over tensors in memory: answers its questions, decides, writes.

Whatever a method asks, the answers are those of a merge through files: sums are made of spans,
folds do not depend on the order, and a model-wide measurement sees every tensor. Tiles are shared
among threads; small tensors are decided several at once, each by one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeVar

from pymerge.errors import PymergeError
from pymerge.in_memory.beside import Beside
from pymerge.methods.protocol import (
    Apply,
    EachTensor,
    Factors,
    Folded,
    Measure,
    Method,
    Solve,
    Statistic,
    Tensor,
    Tile,
    answer,
    decide,
)
from pymerge.ops.executor import Executor, HostExecutor
from pymerge.ops.view import View
from pymerge.ops.workspace import Workspace

#: Inputs of tensors that are decided before the first of them is written.
GROUP_BYTES = 256 << 20
#: Tensors whose matrices are in memory at once.
LANES = 2

Thing = TypeVar("Thing")
Result = TypeVar("Result")


class Inputs(NamedTuple):
    """What a tensor is merged of, in memory: its tiles, the Grams' triangles beside it, and its
    task vectors as pairs of factors."""

    tiles: Sequence[Tile]
    grams: Sequence[Any] = ()
    factors: Sequence[tuple[Any, Any]] | None = None


class Item(Protocol):
    """A tensor to be merged."""

    @property
    def tensor(self) -> Tensor:
        """What the method knows of it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its inputs."""

    @property
    def beside(self) -> Beside | None:
        """The memory of its extras."""

    def inputs(self) -> AbstractContextManager[Inputs]:
        """Its inputs, for as long as the context lasts."""

    def output(self) -> AbstractContextManager[View]:
        """Memory for the result, which is in its place when the context ends."""


class Written(NamedTuple):
    """A merged tensor: its name, what each tile gave, the map that wrote it, and sentences for the
    user."""

    name: str
    tiles: list[Any]
    apply: Apply
    sentences: list[str]


class Driver:
    """Merges items by one method, with threads and matrices of its own until it is closed."""

    def __init__(self, method: Method, executor: Executor, threads: int) -> None:
        self.method = method
        self.executor = executor
        self._threads = threads
        self._device = executor.devices[0]
        self._in_place = isinstance(executor, HostExecutor)
        self._store = _Kept()
        self._stack = ExitStack()
        self._workspace: Workspace | None = None
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="pymerge-memory")
            self._stack.callback(self._pool.shutdown)
        self._stack.callback(executor.close)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and give back what the executor and the matrices hold."""
        self._store.clear()
        self._stack.close()

    def merge(self, items: Sequence[Item]) -> list[Written]:
        """Measure the whole model where the method does, then merge every item."""
        try:
            state = self.measure_model(items)
            return [written for group in self._groups(items) for written in self._run(group, state)]
        finally:
            self._store.clear()

    def measure_model(self, items: Sequence[Item]) -> Any:
        """The state that the method's tensors receive."""
        method = self.method
        if method.measure_model is None or not any(method.model_wide(i.tensor) for i in items):
            return None

        def ask(question: Measure | EachTensor) -> Any:
            if isinstance(question, EachTensor):
                return {item.tensor.name: self._explore(item, question) for item in items}
            total = None if question.fold is None else Folded(question.run, question.fold)
            run = question.run if total is None else total.add
            found = {}
            for item in items:
                with item.inputs() as inputs:
                    tiles = inputs.tiles
                    found[item.tensor.name] = self._each(
                        partial(self._look, run, question.models), tiles, len(tiles) > 1
                    )
            return found if total is None else total.value

        return answer(method.measure_model([item.tensor for item in items]), ask)

    def _explore(self, item: Item, question: EachTensor) -> Any:
        sentences: list[str] = []
        tensor = self._equipped(item.tensor, None, sentences)
        with item.inputs() as inputs:
            ask = partial(self._ask, tensor, inputs, parallel=True)
            return answer(question.run(tensor), ask)

    def _groups(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Items that are decided together; those with matrices a few at a time."""
        group: list[Item] = []
        num_bytes, was_few = 0, False
        for item in items:
            few = self._has_matrices(item.tensor)
            is_full = len(group) == LANES if few else num_bytes + item.num_bytes > GROUP_BYTES
            if group and (is_full or few != was_few):
                yield group
                group, num_bytes = [], 0
            group.append(item)
            num_bytes, was_few = num_bytes + item.num_bytes, few
        if group:
            yield group

    def _run(self, items: Sequence[Item], state: Any) -> list[Written]:
        with ExitStack() as stack:
            inputs = [stack.enter_context(item.inputs()) for item in items]
            sentences: list[list[str]] = [[] for _ in items]
            applies = self._decide(items, inputs, state, sentences)
            outputs = [stack.enter_context(item.output()) for item in items]
            found = self.write(
                [each.tiles for each in inputs], outputs, applies, [item.beside for item in items]
            )
        return [
            Written(item.tensor.name, tiles, apply, heard)
            for item, tiles, apply, heard in zip(items, found, applies, sentences, strict=True)
        ]

    def _decide(
        self,
        items: Sequence[Item],
        inputs: Sequence[Inputs],
        state: Any,
        sentences: Sequence[list[str]],
    ) -> list[Apply]:
        """What is to be written of each item. One with many tiles is looked at by all threads,
        others by one thread each; of matrices much is done on one thread, so that two go at once
        and share the others."""
        applies: dict[int, Apply] = {}

        def one(parallel: bool, index: int) -> None:
            tensor = self._equipped(items[index].tensor, state, sentences[index])
            ask = partial(self._ask, tensor, inputs[index], parallel=parallel)
            applies[index] = decide(self.method, tensor, ask)
            if tensor.workspace is not None:
                tensor.workspace.settle()

        wide = [
            len(each.tiles) > self._threads and not self._has_matrices(item.tensor)
            for item, each in zip(items, inputs, strict=True)
        ]
        for index in range(len(items)):
            if wide[index]:
                one(True, index)
        others = [index for index in range(len(items)) if not wide[index]]
        self._each(partial(one, False), others, len(others) > 1)
        return [applies[index] for index in range(len(items))]

    def write(
        self,
        tiles: Sequence[Sequence[Tile]],
        outputs: Sequence[View],
        applies: Sequence[Apply],
        besides: Sequence[Beside | None] | None = None,
    ) -> list[list[Any]]:
        """Apply to every tile of every tensor; what each gave, in the order of the tiles."""
        work = [(index, tile) for index, some in enumerate(tiles) for tile in some]

        def one(piece: tuple[int, Tile]) -> Any:
            index, tile = piece
            beside = None if besides is None else besides[index]
            return self._write(applies[index], tile, outputs[index], beside)

        results = iter(self._each(one, work, len(work) > 1))
        return [list(islice(results, len(some))) for some in tiles]

    def _write(self, apply: Apply, tile: Tile, out: View, beside: Beside | None) -> Any:
        tile = tile.of_models(apply.models)
        part = out.part(tile.start, tile.num)
        if self._in_place and beside is None:
            return apply.run(tile, part)
        groups = [] if beside is None else beside.views(tile)
        outputs = [part, *chain.from_iterable(groups)]
        with self.executor.here(tile.views, outputs, self._device) as (views, results):
            rest = iter(results[1:])
            extras = [list(islice(rest, len(group))) for group in groups]
            return apply.run(tile.at(views), results[0], *extras)

    def _ask(self, tensor: Tensor, inputs: Inputs, question: Any, *, parallel: bool) -> Any:
        """Answer one question about a tensor."""
        if isinstance(question, Measure):
            return self._measure(tensor, inputs.tiles, question, parallel)
        if isinstance(question, Solve):
            with tensor.room.active():
                return self._solve(tensor, question)
        if isinstance(question, Statistic):
            return inputs.grams[question.model]
        return inputs.factors if isinstance(question, Factors) else None

    def _solve(self, tensor: Tensor, question: Solve) -> Any:
        """Do the work; an objection names the tensor."""
        try:
            return question.run()
        except PymergeError as error:
            if tensor.name in str(error):
                raise
            raise type(error)(f"tensor {tensor.name!r}: {error}") from error

    def _measure(
        self, tensor: Tensor, tiles: Sequence[Tile], question: Measure, parallel: bool
    ) -> Any:
        if tensor.workspace is not None:
            tensor.workspace.settle()
        if question.only is not None:
            tiles = [tiles[question.only]]
        elif question.within is not None:
            first, num = question.within
            tiles = [t for t in tiles if first < t.start + t.num and t.start < first + num]
        parallel = parallel and not question.ordered
        if question.fold is None:
            look = partial(self._look, question.run, question.models)
            return self._each(look, tiles, parallel)
        total = Folded(question.run, question.fold)
        self._each(partial(self._look, total.add, question.models), tiles, parallel)
        return total.value

    def _look(self, run: Callable[[Tile], Any], models: Sequence[int] | None, tile: Tile) -> Any:
        tile = tile.of_models(models)
        if self._in_place:
            return run(tile)
        with self.executor.here(tile.views, device=self._device) as (views, _):
            return run(tile.at(views))

    def _has_matrices(self, tensor: Tensor) -> bool:
        return self.method.cost is not None and bool(self.method.cost(tensor).num_bytes)

    def _equipped(self, tensor: Tensor, state: Any, sentences: list[str]) -> Tensor:
        """The tensor with what it is merged by."""
        tensor = replace(tensor, state=state, warn=sentences.append)
        if not self._has_matrices(tensor):
            return tensor
        if self._workspace is None:
            self._workspace = self._stack.enter_context(Workspace(self._threads, self._device))
        return replace(tensor, workspace=self._workspace, store=self._store)

    def _each(
        self, task: Callable[[Thing], Result], things: Sequence[Thing], parallel: bool
    ) -> list[Result]:
        """``task`` of everything, in order; this thread and the pool's share them."""
        if not parallel or self._pool is None or len(things) < 2:
            return [task(thing) for thing in things]
        left = deque(range(len(things)))
        results: list[Any] = [None] * len(things)

        def drain() -> None:
            try:
                while True:
                    try:
                        index = left.popleft()
                    except IndexError:
                        return
                    results[index] = task(things[index])
            except BaseException:
                left.clear()
                raise

        helpers = min(self._threads, len(things)) - 1
        futures = [self._pool.submit(drain) for _ in range(helpers)]
        try:
            drain()
        finally:
            errors = [error for each in futures if (error := each.exception()) is not None]
        if errors:
            raise errors[0]
        return results


class _Kept(dict[str, Any]):
    """What a model-wide measurement keeps, in memory."""

    def put(self, name: str, array: Any) -> None:
        self[name] = array

    def get(self, name: str) -> Any:  # type: ignore[override]
        return self[name]


def nonfinite(written: Sequence[Written]) -> Mapping[str, int]:
    """The tensors of a result that have non-finite elements, and how many."""
    found = {}
    for each in written:
        count = sum(int(getattr(tile, "nonfinite", tile)) for tile in each.tiles)
        if count:
            found[each.name] = count
    return found
