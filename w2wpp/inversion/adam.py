"""Adam on a latent (Kingma & Ba 2015), the rate falling to zero along a half cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

EPSILON = 1e-8


@dataclass(frozen=True)
class Adam:
    lr: float = 0.1  # a step's length in each coordinate; latents have unit deviation
    betas: tuple[float, float] = (0.9, 0.99)
    anneal: bool = True  # let the rate fall to zero over the run

    def __post_init__(self) -> None:
        if self.lr <= 0 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(
                f"Adam wants a positive rate and betas in [0, 1). Got lr={self.lr}, betas={self.betas}."
            )

    def begin(self, start: Tensor, *, steps: int, seed: int) -> AdamRun:
        return AdamRun(self, start, steps)


class AdamRun:
    gradients, stage = True, "adam"

    def __init__(self, settings: Adam, start: Tensor, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.x = start.detach().clone()  # [B, D]
        self.first, self.second = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.step = 0

    def ask(self) -> Tensor:
        return self.x

    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None
        one, two = self.settings.betas
        rate = self.settings.lr
        if self.settings.anneal:
            rate *= 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.step += 1
        self.first = one * self.first + (1 - one) * gradients
        self.second = two * self.second + (1 - two) * gradients.square()
        mean = self.first / (1 - one**self.step)
        root = (self.second / (1 - two**self.step)).sqrt() + EPSILON
        self.x = self.x - rate * mean / root

    def result(self) -> Tensor:
        return self.x

    def state(self) -> dict[str, Tensor]:
        moments = {"first": self.first, "second": self.second}
        return {"x": self.x, **moments, "step": torch.tensor([self.step])}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.x, self.first, self.second = (state[n].to(self.x) for n in ("x", "first", "second"))
        self.step = int(state["step"])
