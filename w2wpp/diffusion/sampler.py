"""One sampler: DPM-Solver++(2M), multistep and deterministic (Lu et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from .schedule import Schedule

# predict(x [N, C, H, W], timestep [N]) -> what the schedule says that the model predicts, [N, C, H, W]
Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(predict: Predict, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """noise [N, C, H, W] -> clean latents [N, C, H, W], in `steps` evaluations of the model.

    Timesteps are spread evenly over the schedule. Raises ConfigError for fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"Sampling takes at least one step. Got {steps}.")
    times = torch.linspace(len(schedule) - 1, 0, steps + 1, dtype=torch.float64).round().long()[:-1]
    scales = [schedule.scales(int(time)) for time in times]
    x, before = noise, None
    for i, time in enumerate(times):
        x0 = schedule.clean(x, predict(x, time.to(x.device).expand(len(x))), int(time))
        if i == steps - 1:
            break  # to no noise at all, where the estimate itself is the answer
        h = _half_log_snr(scales[i + 1]) - _half_log_snr(scales[i])
        direction = x0
        if before is not None:  # the line through the last two estimates, at half the step
            ratio = (_half_log_snr(scales[i]) - _half_log_snr(scales[i - 1])) / h
            direction = x0 + (x0 - before) / (2 * ratio)
        alpha, sigma = scales[i + 1]
        x, before = sigma / scales[i][1] * x - alpha * math.expm1(-h) * direction, x0
    return x0


def _half_log_snr(scales: tuple[float, float]) -> float:
    """lambda = log(alpha / sigma); of nothing but noise, with which flow models begin, the limit."""
    return math.log(scales[0] / scales[1]) if scales[0] > 0 else -math.inf
