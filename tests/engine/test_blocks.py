"""The pool that the memory budget consists of."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pymerge.engine.blocks import BlockPool, Stopped

BLOCK = 4096


def wait_for_waiters(pool: BlockPool, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(pool._turn) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_blocks_lie_apart_in_the_arena() -> None:
    pool = BlockPool(BLOCK, 7)
    taken = pool.acquire(7)
    assert sorted(taken) == [min(taken) + index * BLOCK for index in range(7)]
    assert pool.num_free == 0
    pool.release(taken)
    assert pool.num_free == 7


def test_block_that_was_touched_last_is_taken_first() -> None:
    pool = BlockPool(BLOCK, 4)
    first = pool.acquire(1)
    pool.release(first)
    assert pool.acquire(1) == first


def test_more_than_the_pool_has_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="4 blocks asked for, the pool has 3"):
        BlockPool(BLOCK, 3).acquire(4)


def test_whole_pool_and_nothing() -> None:
    pool = BlockPool(BLOCK, 3)
    assert pool.acquire(0) == []
    assert len(pool.acquire(3)) == 3
    assert pool.acquire(0) == []


def test_requests_are_served_in_order() -> None:
    """A small request does not overtake a large one that came first, so none starves."""
    pool = BlockPool(BLOCK, 8)
    held = pool.acquire(8)
    served: list[int] = []
    threads = []

    def take(count: int) -> None:
        blocks = pool.acquire(count)
        served.append(count)
        pool.release(blocks)

    for waiting, count in enumerate((8, 1, 5, 2)):
        thread = threading.Thread(target=take, args=(count,))
        thread.start()
        threads.append(thread)
        wait_for_waiters(pool, waiting + 1)
    for part in (held[:3], held[3:7]):
        pool.release(part)
        time.sleep(0.02)
        assert served == []
    pool.release(held[7:])
    for thread in threads:
        thread.join(10)
    assert served[0] == 8
    assert sorted(served) == [1, 2, 5, 8]
    assert pool.num_free == 8


def test_no_block_is_handed_out_twice() -> None:
    pool = BlockPool(BLOCK, 16)
    owners: dict[int, int] = {}
    clashes: list[int] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            blocks = pool.acquire(rng.randint(1, 16))
            with lock:
                clashes.extend(block for block in blocks if block in owners)
                owners.update(dict.fromkeys(blocks, seed))
            if rng.random() < 0.2:
                time.sleep(0.0001)
            with lock:
                for block in blocks:
                    del owners[block]
            cut = rng.randint(0, len(blocks))
            pool.release(blocks[:cut])
            pool.release(blocks[cut:])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert clashes == []
    assert pool.num_free == 16
    assert len(set(pool.acquire(16))) == 16


def test_stop_wakes_all() -> None:
    pool = BlockPool(BLOCK, 2)
    held = pool.acquire(2)
    stopped: list[int] = []

    def wait(number: int) -> None:
        with pytest.raises(Stopped):
            pool.acquire(1 + number % 2)
        stopped.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    wait_for_waiters(pool, 5)
    pool.stop()
    for thread in threads:
        thread.join(10)
    assert sorted(stopped) == [0, 1, 2, 3, 4]
    pool.release(held)
    with pytest.raises(Stopped):
        pool.acquire(1)
    assert pool.num_free == 2
