"""Work on several threads, each on its share of the cores."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from w2wpp.workers import in_order


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_results_come_in_order_and_each_call_is_made_once(count):
    called = []
    later = threading.Event()

    def call(i):
        called.append(i)
        if i == 0 and count > 2:
            assert later.wait(30)  # the first one ends after the third has begun
        if i == 2:
            later.set()
        return i * i

    assert list(in_order(call, count, at_once=3, cores=1)) == [i * i for i in range(count)]
    assert sorted(called) == list(range(count))


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_each_has_its_share_of_the_cores_and_nobody_else_is_touched():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        work = in_order(lambda _: torch.get_num_threads(), 4, at_once=2, cores=2)
        assert next(work) == 2
        assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == 3
        assert list(work) == [2, 2, 2]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_call_raises_comes_in_its_turn_and_ends_the_work():
    called = []

    def call(i):
        called.append(i)
        if i == 1:
            raise ValueError("the second")
        return i

    work = in_order(call, 100, at_once=2, cores=1)
    assert next(work) == 0
    with pytest.raises(ValueError, match="the second"):
        next(work)
    assert len(called) <= 3


def test_nothing_begins_once_the_caller_has_gone():
    called = []
    work = in_order(called.append, 100, at_once=2, cores=1)
    next(work)
    work.close()
    assert len(called) <= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("w2wpp-work")]
