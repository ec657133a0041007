"""Several starts screened under common random numbers, then gradient from the best of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ..errors import ConfigError, check_finite
from .adam import Adam, AdamRun


@dataclass(frozen=True)
class Multistart:
    """Screen several starts for one step, then follow the gradient from each person's best."""

    gradients: ClassVar[bool] = True

    starts: int = 4  # candidates: the start, the start scaled, and samples around it
    scales: tuple[float, ...] = (0.7, 1.3)  # of the start; from the mean they say nothing
    spread: float = 0.5  # standard deviation of the samples around the start
    adam: Adam = field(default_factory=Adam)

    def __post_init__(self) -> None:
        check_finite("Hybrid", spread=self.spread, **{f"scale {s}": s for s in self.scales})
        if self.starts < 1 or self.spread < 0:
            raise ConfigError(
                f"Multistart takes one start or more and a spread of zero or more. Got {self}."
            )

    def with_rate(self, rate: float) -> Multistart:
        return replace(self, adam=self.adam.with_rate(rate))

    def begin(self, start: Tensor, *, steps: int, seed: int) -> MultistartRun:
        return MultistartRun(self, start, steps, seed)


class MultistartRun:
    """One run: a step that screens the starts, then Adam."""

    def __init__(self, settings: Multistart, start: Tensor, steps: int, seed: int) -> None:
        self.settings, self.steps, self.start = settings, steps, start.detach().clone()
        self.candidates = self._candidates(torch.Generator().manual_seed(seed % 2**63))
        self.run: AdamRun | None = None

    @property
    def gradients(self) -> bool:
        return self.run is not None

    @property
    def stage(self) -> str:
        return "screening" if self.run is None else self.run.stage

    def ask(self) -> Tensor:
        if self.run is not None:
            return self.run.ask()
        return rearrange(self.candidates, "people starts d -> (people starts) d")

    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        if self.run is not None:
            self.run.tell(losses, gradients)
            return
        best = rearrange(losses, "(people starts) -> people starts", people=len(self.start))
        best = best.argmin(1).to(self.candidates.device)  # [B]
        self._descend(self.candidates[torch.arange(len(best)), best])

    def result(self) -> Tensor:
        return self.start if self.run is None else self.run.result()

    def state(self) -> dict[str, Tensor]:
        return {} if self.run is None else self.run.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            self._descend(state["x"].to(self.start))
            assert self.run is not None
            self.run.restore(state)

    def _descend(self, start: Tensor) -> None:
        self.run = self.settings.adam.begin(start, steps=max(1, self.steps - 1), seed=0)

    def _candidates(self, generator: torch.Generator) -> Tensor:
        """[B, starts, D]"""
        shape = (len(self.start), self.settings.starts, self.start.shape[1])
        noise = torch.randn(shape, generator=generator).to(self.start) * self.settings.spread
        noise[:, 0] = 0
        found = self.start[:, None] + noise
        if bool(self.start.any()):
            for i, scale in enumerate(self.settings.scales[: self.settings.starts - 1], start=1):
                found[:, i] = self.start * scale
        return found
