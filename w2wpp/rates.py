"""How step sizes change over a run."""

from __future__ import annotations

import math


def half_cosine(progress: float) -> float:
    """1 at progress 0, falling to 0 at progress 1 (SGDR without restarts, Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warm_cosine(step: int, steps: int, *, warmup: int = 0) -> float:
    """The same over ``steps``, rising linearly over the first ``warmup`` of them."""
    return min(1.0, (step + 1) / max(1, warmup)) * half_cosine(step / steps)
