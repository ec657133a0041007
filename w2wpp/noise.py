"""Standard normal numbers that are the same bits on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError


def standard_normal(rows: int, columns: int, *, generator: torch.Generator) -> Tensor:
    """[rows, columns] in single precision, row after row: a longer draw starts with the shorter
    one.

    `torch.randn` fills large tensors by a vectorised Box-Muller transform whose last bits depend on
    the processor's SIMD width and whose order depends on the size. Integers of a CPU generator
    depend on neither, so they are drawn instead and sent through the inverse distribution function
    in double precision; rounding to single precision then hides what differs between math
    libraries.

    Raises ConfigError for a generator that is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ConfigError(
            "Reproducible samples need a CPU generator, torch.Generator(). Got one on "
            f"{generator.device}."
        )
    steps = 1 << 52  # (k + 1/2) / steps is exact in double precision and never 0 or 1
    k = torch.randint(steps, (rows, columns), generator=generator, dtype=torch.int64)
    return torch.special.ndtri((k.double() + 0.5) / steps).float()
