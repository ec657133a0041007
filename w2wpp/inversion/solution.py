"""What an inversion tells on its way, and what it gives in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..identity import Identity


class StopInversion(Exception):
    """Raised in a callback: end here and keep the best so far."""


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is told after every step."""

    step: int  # made so far, over both stages
    steps: int
    loss: float  # of this step, mean over people
    best: Identity
    evaluations: int
    stage: str


@dataclass(frozen=True, eq=False)
class Solution:
    """What an inversion found, and what it took."""

    identity: Identity
    history: list[float]  # loss of every step, mean over people
    # Pictures of each person through the UNet, those that only compared points included.
    evaluations: int
    stop_reason: str
    loss: list[float]  # by person: of the identity, or of the last step where that is kept
    # Mean length of the residual in whitened coefficients; 0 without a pivotal stage.
    residual_norm: float


Callback = Callable[[Progress], Any]
