"""The storage floor: every input byte read and the output written, with nothing else.

    python bench/floor.py --out DIR/floor.bin --out-bytes N [--no-sync] FILE...

It goes through the engine's own primitives (`pymerge._C`: positional reads by the method that the
engine would choose, writes to a preallocated file in place, fdatasync unless --no-sync) with reads
and writes mixed evenly, as a merge does them. What is written are the bytes that happened to be in
the buffer. Prints one JSON object. A merge cannot be faster than this on the same files in the same
state of the page cache; floor seconds over merge seconds is the floor fraction.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pymerge import _C

SPARE = 8192  # direct reads fetch up to this much around the asked range
BLOCK = 2 << 20
THREADS = 8  # as many reads and writes in flight as the engine has
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Floor:
    """Wall and CPU seconds of one pass, the bytes it moved and how the files were read."""

    seconds: float
    cpu: float
    read_bytes: int
    written_bytes: int
    sync: bool
    threads: int
    read_methods: tuple[str, ...]
    copy_gb_per_s: float


def measure(
    inputs: Sequence[Path], out: Path, out_bytes: int, *, sync: bool, threads: int
) -> tuple[float, tuple[str, ...]]:
    """Seconds to read ``inputs`` whole and write ``out_bytes`` to ``out``, and the read methods."""
    sizes = [path.stat().st_size for path in inputs]
    reads: list[tuple[int | None, int, int]] = [
        (file, offset, min(BLOCK, size - offset))
        for file, size in enumerate(sizes)
        for offset in range(0, size, BLOCK)
    ]
    writes: list[tuple[int | None, int, int]] = [
        (None, offset, min(BLOCK, out_bytes - offset)) for offset in range(0, out_bytes, BLOCK)
    ]
    mixed = [(index / len(reads), work) for index, work in enumerate(reads)]
    mixed += [(index / len(writes), work) for index, work in enumerate(writes)]
    queue = iter([work for _, work in sorted(mixed, key=lambda item: item[0])])
    lock = threading.Lock()

    start = time.perf_counter()
    methods = [_C.probe_read_method(str(path))[0] for path in inputs]
    sources = [
        _C.SourceFile(str(path), method) for path, method in zip(inputs, methods, strict=True)
    ]
    target = _C.ShardFile(str(out), out_bytes, drop_cache=True)

    def work() -> None:
        arena = _C.Arena(BLOCK + SPARE)
        while True:
            with lock:
                item = next(queue, None)
            if item is None:
                return
            file, offset, length = item
            if file is None:
                target.write(offset, arena.address, length)
            else:
                sources[file].read(offset, length, arena.address, BLOCK + SPARE)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    if sync:
        target.sync()
    target.close()
    seconds = time.perf_counter() - start
    for source in sources:
        source.close()
    return seconds, tuple(sorted(set(methods)))


def copy_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes read plus bytes written per second, in 1e9, when ``threads`` threads copy memory.

    The best of some passes over buffers far larger than the caches.
    """
    part = COPY_BYTES // threads
    pairs = [(_C.Arena(part), _C.Arena(part)) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first pass touches the pages
            start = time.perf_counter()
            list(pool.map(lambda pair: _C.copy(pair[0].address, pair[1].address, part), pairs))
            best = min(best, time.perf_counter() - start)
    return 2 * part * threads / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the storage floor of a merge.")
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--out-bytes", type=int, required=True)
    parser.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    cpu = time.process_time()
    seconds, methods = measure(
        arguments.inputs,
        arguments.out,
        arguments.out_bytes,
        sync=arguments.sync,
        threads=arguments.threads,
    )
    cpu = time.process_time() - cpu
    arguments.out.unlink()
    floor = Floor(
        seconds=seconds,
        cpu=cpu,
        read_bytes=sum(path.stat().st_size for path in arguments.inputs),
        written_bytes=arguments.out_bytes,
        sync=arguments.sync,
        threads=arguments.threads,
        read_methods=methods,
        copy_gb_per_s=copy_bandwidth(len(os.sched_getaffinity(0))),
    )
    print(json.dumps(asdict(floor)))


if __name__ == "__main__":
    main()
