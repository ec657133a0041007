"""KL annealing: how the weight of the KL term grows over the epochs of a training."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError

Schedule = Callable[[float], float]  # epoch, from 0 and with fractions -> weight of the KL term


def off(beta: float, warmup: float, epochs: float) -> Schedule:
    """The full weight from the first step."""
    return lambda epoch: beta


def linear(beta: float, warmup: float, epochs: float) -> Schedule:
    """From 0 to beta over the warm-up (Sonderby et al. 2016)."""
    return lambda epoch: beta * min(1.0, epoch / warmup)


def sigmoid(beta: float, warmup: float, epochs: float) -> Schedule:
    """A logistic rise around the middle of the warm-up (Bowman et al. 2016): beta / 400 at its start."""
    return lambda epoch: beta / (1.0 + math.exp(min(700.0, -12.0 * (epoch / warmup - 0.5))))


def cyclical(beta: float, warmup: float, epochs: float) -> Schedule:
    """Four cycles, each a linear rise over its first half and then beta (Fu et al. 2019)."""
    period = epochs / 4.0

    def weight(epoch: float) -> float:
        if epoch >= epochs:
            return beta
        return beta * min(1.0, (epoch % period) / (0.5 * period))

    return weight


def original(beta: float, warmup: float, epochs: float) -> Schedule:
    """That of the original w2w++: 0 for five epochs, then 0.001 to 0.005 over four; a step per whole epoch."""

    def weight(epoch: float) -> float:
        rise = math.floor(epoch) - 5
        return 0.0 if rise < 0 else 0.001 + 0.004 * min(1.0, rise / 4.0)

    return weight


SCHEDULES = {f.__name__: f for f in (off, linear, sigmoid, cyclical, original)}
OLDER_NAMES = {"seed": "original"}


def kl_schedule(name: str, *, beta: float, warmup: float, epochs: float) -> Schedule:
    """A schedule by name. `beta` is the final weight (the preset `original` brings its own), times are in epochs.

    Raises ConfigError for an unknown name or negative numbers.
    """
    name = OLDER_NAMES.get(name, name)
    if name not in SCHEDULES:
        raise ConfigError(f"KL annealing is one of {', '.join(SCHEDULES)}. Got {name!r}.")
    if not (math.isfinite(beta) and beta >= 0) or warmup <= 0 or epochs <= 0:
        raise ConfigError(
            f"KL annealing needs beta >= 0, warmup > 0 and epochs > 0. Got {beta=}, {warmup=}, "
            f"{epochs=}."
        )
    return SCHEDULES[name](beta, warmup, epochs)
