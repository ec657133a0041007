"""The pivotal stage: once the latent has settled, coefficients may leave it (after Roich et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, check_finite
from .adam import Adam


@dataclass(frozen=True)
class Pivotal:
    """The residual [B, K] moves in whitened coefficients; decay pulls it back to the settled latent."""

    steps: int = 4
    lr: float = 0.05
    decay: float = 1e-3  # weight of |residual|^2 / 2 in the loss

    def __post_init__(self) -> None:
        check_finite("A pivotal stage", lr=self.lr, decay=self.decay)
        if self.steps < 1 or self.lr <= 0 or self.decay < 0:
            raise ConfigError(
                f"A pivotal stage wants steps, a rate and no negative decay. Got {self}."
            )

    def optimiser(self) -> Adam:
        """What moves the residual."""
        return Adam(lr=self.lr)
