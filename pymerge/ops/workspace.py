"""Where matrices are computed: a torch device, and the threads that share the work.

Ops on whole matrices take torch tensors and a :class:`Workspace`. GEMM, eigh and Cholesky are
torch's; with several BLAS threads their last bits depend on how many there are. So every call runs
on one BLAS thread, big ones are cut into panels whose sizes depend on the shapes alone, and the
panels are shared among the workers: the result does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Rows of a panel on the CPU: enough work for BLAS, and enough panels for every worker.
PANEL = 256
#: Rows of a panel on a device, which fills itself with one call.
DEVICE_PANEL = 8192

_thread = threading.local()
_lock = threading.Lock()


@contextmanager
def _full_precision(torch: Any) -> Iterator[None]:
    """Products of float32 in float32. Torch keeps this for the whole process, so the first who
    comes here sets it and the last who leaves sets it back."""
    with _lock:
        if not _Precision.users:
            _Precision.before = _Precision.get(torch)
            _Precision.put(torch, _Precision.full(torch))
        _Precision.users += 1
    try:
        yield
    finally:
        with _lock:
            _Precision.users -= 1
            if not _Precision.users:
                _Precision.put(torch, _Precision.before)


class _Precision:
    """Torch's settings of the precision of products, by the names that this version has."""

    users = 0
    before: Any = None

    @staticmethod
    def _places(torch: Any) -> list[Any]:
        places = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        return [place for place in places if hasattr(place, "fp32_precision")]

    @classmethod
    def full(cls, torch: Any) -> Any:
        return ["ieee"] * len(cls._places(torch)) or "highest"

    @classmethod
    def get(cls, torch: Any) -> Any:
        # Where there are newer names, asking by the older one may be an error.
        found = [place.fp32_precision for place in cls._places(torch)]
        return found or torch.get_float32_matmul_precision()

    @classmethod
    def put(cls, torch: Any, value: Any) -> None:
        if isinstance(value, str):
            torch.set_float32_matmul_precision(value)
            return
        for place, each in zip(cls._places(torch), value, strict=True):
            place.fp32_precision = each


def _set_threads(torch: Any, num: int) -> None:
    """The threads of this thread's BLAS calls. Torch gives the number that was set last to every
    thread that calls it for the first time later: a thread made for it sets that one back."""
    known, done = threading.Event(), threading.Event()

    def keep() -> None:
        of_others = torch.get_num_threads()
        known.set()
        done.wait()
        torch.set_num_threads(of_others)

    with _lock:
        keeper = threading.Thread(target=keep, name="pymerge-keeper")
        keeper.start()
        known.wait()
        torch.get_num_threads()  # or the thread's first call takes the number of others later on
        torch.set_num_threads(num)
        done.set()
        keeper.join()


class Workspace:
    """A torch device and the workers that compute there.

    :param threads: workers; the results do not depend on it. On a device there is one.
    :param device: torch's name of the device.
    :param check: called between pieces of work; raises to give up.
    """

    def __init__(
        self, threads: int = 1, device: str = "cpu", check: Callable[[], None] | None = None
    ) -> None:
        import torch

        self._torch = torch
        self.name = device
        self.device = torch.device(device)
        self.threads = threads if self.on_host else 1
        self._check = check
        self._pool: ThreadPoolExecutor | None = None
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(
                self.threads, thread_name_prefix="pymerge-matrix", initializer=self._start_worker
            )

    @property
    def on_host(self) -> bool:
        return self.device.type == "cpu"

    def _start_worker(self) -> None:
        _thread.working = True
        _set_threads(self._torch, 1)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Everything that computes with the workspace runs inside: on the host this thread's BLAS
        calls take one thread, on a device they go there in full float32."""
        torch = self._torch
        here: AbstractContextManager[Any] = (
            nullcontext() if self.on_host else torch.cuda.device(self.device)
        )
        before = torch.get_num_threads()
        alone = self.on_host and before != 1
        with here, torch.no_grad(), _full_precision(torch):
            if alone:
                _set_threads(torch, 1)
            try:
                yield
                self.settle()
            finally:
                if alone:
                    _set_threads(torch, before)

    def settle(self) -> None:
        """Wait until what this workspace began on its device is done: other streams see it then."""
        if not self.on_host:
            self._torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Give up here if the run is ending."""
        if self._check is not None:
            self._check()

    def map(self, task: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``task`` of every item, in order; the workers share them. A map within a task runs where
        it is."""

        def run(item: Item) -> Result:
            self.check()
            with self._torch.no_grad():
                return task(item)

        work = list(items)
        if self._pool is None or getattr(_thread, "working", False) or len(work) < 2:
            return [run(item) for item in work]
        return list(self._pool.map(run, work))

    def panels(self, num: int, size: int | None = None) -> list[slice]:
        """``num`` rows cut into panels; the cut depends on ``num`` and the kind of device alone."""
        step = size or (PANEL if self.on_host else DEVICE_PANEL)
        return [slice(first, min(first + step, num)) for first in range(0, num, step)]

    def empty(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        """An uninitialised tensor on the device."""
        made: torch.Tensor = self._torch.empty(
            shape, dtype=getattr(self._torch, dtype), device=self.device
        )
        return made

    def zeros(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        """Zeros on the device."""
        return self.empty(*shape, dtype=dtype).zero_()

    def matmul(
        self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``left @ right`` by panels of left's rows; both of one dtype."""
        if out is None:
            out = left.new_empty((left.shape[0], right.shape[1]))

        def panel(rows: slice) -> None:
            self._torch.mm(left[rows], right, out=out[rows])

        self.map(panel, self.panels(left.shape[0]))
        return out

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def total_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
