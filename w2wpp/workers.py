"""Several pieces of work at a time on one processor, each on its share of the cores.

PyTorch gives every operation all cores. Where there are many middling ones that do not depend on each other, a few
threads with a few cores each are quicker: they do not wait for one another at the end of every operation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_order(call: Callable[[int], T], count: int, *, at_once: int, cores: int) -> Iterator[T]:
    """call(0), call(1), ... call(count - 1) in this order, up to `at_once` of them begun before their turn.

    Each runs its operations on so many cores. What a call raises is raised in its turn; none begins after that, or
    after the caller has gone.
    """
    at_once = min(at_once, count)
    ready = threading.Barrier(at_once + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes over the common number when it first asks for it
        torch.set_num_threads(cores)
        ready.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, at_once), "w2wpp-work", initializer=begin)
    try:
        coming: deque[Future[T]] = deque(pool.submit(call, i) for i in range(at_once))
        ready.wait()
        # The number is each thread's own, but the last one given is that of threads to come as well.
        torch.set_num_threads(before)
        for i in range(at_once, count + at_once):
            yield coming.popleft().result()
            if i < count:
                coming.append(pool.submit(call, i))
    finally:
        pool.shutdown(cancel_futures=True)
