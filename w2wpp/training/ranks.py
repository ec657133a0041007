"""Several processes on one training, started by `torchrun`: who does what, and how sums come together.

Every process holds the same small matrices and draws the same random numbers; each reads its own
share of the rows, and sums over rows are added up. One of them, the writer, writes files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

A = TypeVar("A")
R = TypeVar("R")
S = TypeVar("S", Tensor, "list[int]", "list[tuple[int, int]]", range)


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `size`. One alone needs no torch.distributed, and costs nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def mine(self, things: S) -> S:
        """This rank's part of a sequence or tensor: contiguous, sizes differ by one at most."""
        n = len(things)
        part: S = things[self.rank * n // self.size : (self.rank + 1) * n // self.size]  # type: ignore[assignment]
        return part

    def sum(self, t: Tensor) -> Tensor:
        """The sum over ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def share(self, t: Tensor, source: int = 0) -> Tensor:
        """A tensor of one rank (by default the writer's) on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(t, source)
        return t

    def wait(self) -> None:
        """Until every rank has come this far."""
        if self.size > 1:
            dist.barrier()


def current_ranks() -> Ranks:
    """The group that is there already, or that `torchrun` asks for; otherwise one process."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
            return Ranks()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        # gloo for what lives on the CPU, nccl for what lives on a GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), dist.get_world_size())


def among_ranks(work: Callable[[A], R]) -> Callable[[A], R]:
    """A verb that `torchrun` may start: it leaves its group when it is done or has failed."""

    @functools.wraps(work)
    def run(arguments: A) -> R:
        try:
            return work(arguments)
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return run
