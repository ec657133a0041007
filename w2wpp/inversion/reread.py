"""A start is painted and read again, and moves by what was read differently: what an answer's paintings say of it.

A network that answers everything too close to the average, or off to one side under this prompt, does the same to
paintings of its answers; the difference between both readings is free of that (as in the iterative feedback of
Carreira et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ConfigError

PAINT_STEPS = 8  # evaluations of a painting, enough to know the face by


def check_reread(times: int, rate: float) -> None:
    """Raises ConfigError for numbers that mean nothing."""
    if times < 0 or not 0 < rate <= 1:
        raise ConfigError(
            f"A start is read again 0 times or more, and moves by a share of the difference. Got {times}, {rate}."
        )


def reread(
    z: Tensor, wanted: Tensor, read: Callable[[Tensor], Tensor], *, times: int, rate: float
) -> Tensor:
    """Latents z [B, d], what was read of the pictures [B, d], and what is read of paintings of latents."""
    check_reread(times, rate)
    for _ in range(times):
        z = z + rate * (wanted - read(z).to(z))
    return z
