"""A loss on what the model does: its outputs under decoded LoRAs against those under the true ones.

A metric on weights is this loss up to second order (`sketch`); the term is the loss itself, and costs a forward and a
backward pass of the model for every row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError
from ..space import SpaceBasis

MEASURED = 64  # rows on which the unit of the term is measured


@dataclass(eq=False)
class OutputTerm:
    """weight * E|y(w'; x, t) - y(w; x, t)|^2 / E|y(w; x, t) - y(mean; x, t)|^2 over a few rows of every minibatch.

    y is the model's output for pictures [M, C, H, W] as it sees them, noised anew for every row; so the term is the
    share of what LoRAs do that reconstruction loses. vectors [n, P] are the true ones of the rows that are trained on.
    """

    denoise: Denoise
    schedule: Schedule
    pictures: Tensor
    basis: SpaceBasis
    vectors: Tensor
    weight: float = 1.0
    rows: int = 4
    _unit: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.rows < 1 or self.pictures.ndim != 4:
            raise ConfigError(
                "A term on outputs needs a weight, rows and pictures [M, C, H, W]. Got "
                f"weight={self.weight}, rows={self.rows} and {list(self.pictures.shape)}."
            )

    def config(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"weight": self.weight, "rows": self.rows, "pictures": len(self.pictures)}

    def __call__(self, decoded: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The term for coefficients [B, K] decoded for rows [B] of ``vectors``; only the first few are looked at."""
        few, true = decoded[: self.rows].float(), self.vectors[rows[: self.rows].cpu()]
        true = true.to(few)
        noisy, timestep = self._noised(len(few), generator, few)
        with torch.no_grad():
            goal = self.denoise(noisy, timestep, true).float()
        found = self.denoise(noisy, timestep, self.basis.lift(few)).float()
        return self.weight * (found - goal).square().mean() / self._scale(generator, few)

    @torch.no_grad()
    def _scale(self, generator: torch.Generator, like: Tensor) -> float:
        """Mean square of what a LoRA changes of the outputs, measured once."""
        if not self._unit:
            rows = torch.randint(len(self.vectors), (MEASURED,), generator=generator)
            noisy, timestep = self._noised(MEASURED, generator, like)
            mean = self.vectors.mean(0, keepdim=True).to(like)
            changed = self.denoise(noisy, timestep, self.vectors[rows].to(like)).float()
            plain = self.denoise(noisy, timestep, mean.expand(MEASURED, -1)).float()
            self._unit = max(float((changed - plain).square().mean()), 1e-12)
        return self._unit

    def _noised(
        self, count: int, generator: torch.Generator, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noised pictures [count, C, H, W] and timesteps [count], spread over the schedule."""
        shown = torch.randint(len(self.pictures), (count,), generator=generator)
        spread = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        timestep = (spread / count * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)
        noise = torch.randn(count, *self.pictures.shape[1:], generator=generator)
        pictures, timestep = self.pictures[shown].to(like), timestep.to(like.device)
        return self.schedule.add_noise(pictures, noise.to(like), timestep)[0], timestep
