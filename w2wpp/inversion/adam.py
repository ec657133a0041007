"""Adam on a latent (Kingma & Ba 2015), the rate falling to zero along a half cosine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, check_finite
from ..rates import half_cosine


@dataclass(frozen=True)
class Adam:
    """Settings of Adam. Betas, epsilon and bias correction as in the paper; the rate is annealed."""

    gradients: ClassVar[bool] = True

    lr: float = 0.1  # a step's length in each coordinate; latents have unit std
    betas: tuple[float, float] = (0.9, 0.99)
    anneal: bool = True  # let the rate fall to zero over the run

    def __post_init__(self) -> None:
        check_finite("Adam", lr=self.lr)
        if self.lr <= 0 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(
                f"Adam wants a positive rate and betas in [0, 1). Got lr={self.lr}, betas={self.betas}."
            )

    def with_rate(self, rate: float) -> Adam:
        return replace(self, lr=rate)

    def begin(self, start: Tensor, *, steps: int, seed: int) -> AdamRun:
        return AdamRun(self, start, steps)


class AdamRun:
    """One run of Adam: x [B, D] and its two moments."""

    gradients, stage = True, "adam"

    @torch.inference_mode(False)
    def __init__(self, settings: Adam, start: Tensor, steps: int) -> None:
        self.settings, self.steps, self.taken = settings, steps, 0
        self.x = start.detach().clone()  # [B, D]
        self._adam = torch.optim.Adam([self.x], lr=settings.lr, betas=settings.betas)

    def ask(self) -> Tensor:
        return self.x.clone()

    @torch.inference_mode(False)
    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None
        if self.settings.anneal:
            (group,) = self._adam.param_groups
            group["lr"] = self.settings.lr * half_cosine(self.taken / self.steps)
        self.x.grad = gradients.clone()
        self._adam.step()
        self.taken += 1

    def result(self) -> Tensor:
        return self.x.clone()

    def state(self) -> dict[str, Tensor]:
        moments = self._adam.state_dict()["state"].get(0, {})  # nothing before the first step
        return {"x": self.x, "taken": torch.tensor([self.taken]), **moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        moments = dict(state)
        self.x.copy_(moments.pop("x"))
        self.taken = int(moments.pop("taken"))
        self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: moments}})
