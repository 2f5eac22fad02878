"""What happens during a run: stage times, progress counters and, on request, a Chrome trace."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pymerge.errors import StorageError

STAGES = ("read", "compute", "solve", "write")


@dataclass(frozen=True)
class Snapshot:
    """Progress at one moment: bytes done and planned, and which stage is the busiest so far."""

    phase: str
    bytes_read: int
    bytes_read_total: int
    bytes_written: int
    bytes_written_total: int
    tensors_done: int
    tensors_total: int
    seconds: float
    busiest: str


class Events:
    """Counters of one run; every method may be called from any thread."""

    def __init__(self, *, trace: bool = False) -> None:
        self.started = time.perf_counter()
        self.phase = "merge"
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.bytes = dict.fromkeys(STAGES, 0)
        self.tensors_done = 0
        self._trace: list[tuple[str, str, float, float, int]] | None = [] if trace else None
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, stage: str, tensor: str, num_bytes: int) -> Iterator[None]:
        """Time one piece of work of a tensor and count its bytes."""
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        with self._lock:
            self.seconds[stage] += end - begin
            self.bytes[stage] += num_bytes
        if self._trace is not None:
            self._trace.append((stage, tensor, begin, end, threading.get_ident()))

    def tensor_done(self) -> None:
        with self._lock:
            self.tensors_done += 1

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def snapshot(self, bytes_read: int, bytes_written: int, tensors: int) -> Snapshot:
        """Progress against the totals of the plan."""
        with self._lock:
            busiest = max(STAGES, key=lambda stage: self.seconds[stage])
            return Snapshot(
                self.phase,
                self.bytes["read"],
                bytes_read,
                self.bytes["write"],
                bytes_written,
                self.tensors_done,
                tensors,
                self.elapsed,
                busiest,
            )

    def write_trace(self, path: Path) -> None:
        """Write the trace in Chrome's trace-event format (open in ui.perfetto.dev).

        :raises StorageError: the file cannot be written.
        """
        threads: dict[int, int] = {}
        events = [
            {
                "name": tensor,
                "cat": stage,
                "ph": "X",
                "ts": round((begin - self.started) * 1e6, 1),
                "dur": round((end - begin) * 1e6, 1),
                "pid": STAGES.index(stage),
                "tid": threads.setdefault(thread, len(threads)),
            }
            for stage, tensor, begin, end, thread in self._trace or ()
        ]
        names = [
            {"name": "process_name", "ph": "M", "pid": number, "args": {"name": stage}}
            for number, stage in enumerate(STAGES)
        ]
        try:
            path.write_text(json.dumps({"traceEvents": names + events}))
        except OSError as error:
            raise StorageError(f"cannot write the trace to {path}: {error}") from error
