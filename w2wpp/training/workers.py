"""A function of many things, computed by several processes, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
TOGETHER = 16  # things that a process gets at a time


def in_order(function: Callable[[T], R], things: Sequence[T], workers: int) -> Iterator[R]:
    """function(thing) for every thing. With several workers it must be picklable, and so must its results
    be without torch's shared memory (numpy arrays, not tensors); each works single-threaded."""
    if workers < 2 or len(things) < 2 * TOGETHER:
        yield from map(function, things)
        return
    batches = (things[i : i + TOGETHER] for i in range(0, len(things), TOGETHER))
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    waiting: deque[Future[list[Any]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_each, function, batch))
            if len(waiting) > 2 * workers:  # so that results do not pile up
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[T], R], things: Sequence[T]) -> list[R]:
    return [function(thing) for thing in things]
