"""The noise schedule of a diffusion model, and what its predictions are worth at each timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

PREDICTIONS = ("eps", "v_prediction")
WEIGHTINGS = ("native", "eps", "v", "x0", "min-snr")
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod [T] of a discrete schedule, and what the model predicts."""

    alphas_cumprod: Tensor
    prediction: str  # "eps" or "v_prediction"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(
                f"Inversion knows models that predict {' or '.join(PREDICTIONS)}. Got "
                f"{self.prediction!r}."
            )
        a = self.alphas_cumprod
        if a.ndim != 1 or not len(a) or not bool(((a > 0) & (a < 1)).all()):
            raise ShapeError(
                f"alphas_cumprod is [T] with numbers between 0 and 1. Got {list(a.shape)}."
            )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timestep: int) -> tuple[float, float]:
        """Of the picture and of the noise in a noisy picture: alpha and sigma, alpha^2 + sigma^2 = 1."""
        abar = float(self.alphas_cumprod[timestep])
        return abar**0.5, (1.0 - abar) ** 0.5

    def clean(self, noisy: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
        """The picture that a prediction means: noisy and output [N, C, H, W] -> x0 [N, C, H, W]."""
        if self.prediction == "eps":
            return (noisy - sigma * output) / alpha
        return alpha * noisy - sigma * output

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """x0, noise [N, C, H, W], timestep [N] -> noisy pictures and the target of the prediction
        (Ho et al. 2020 eq. 4; Salimans & Ho 2022 app. D)."""
        shape = (-1, *([1] * (x0.ndim - 1)))
        abar = self.alphas_cumprod.to(timestep.device)[timestep].to(x0).reshape(shape)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        target = noise if self.prediction == "eps" else alpha * noise - sigma * x0
        return alpha * x0 + sigma * noise, target

    def weights(self, weighting: str) -> Tensor:
        """[T]: the factor that turns the squared error of the prediction into that of another
        parametrisation. In errors of x0, eps weighs SNR and v weighs SNR + 1.

        Raises ConfigError for an unknown weighting.
        """
        if weighting not in WEIGHTINGS:
            raise ConfigError(
                f"Weightings of the loss are {', '.join(WEIGHTINGS)}. Got {weighting!r}."
            )
        abar = self.alphas_cumprod.double()
        snr = abar / (1 - abar)
        factors = {
            "eps": snr,
            "v": snr + 1,
            "x0": torch.ones_like(snr),
            "min-snr": snr.clamp(max=MIN_SNR_GAMMA),
        }
        own = factors["eps" if self.prediction == "eps" else "v"]
        return torch.ones_like(snr) if weighting == "native" else factors[weighting] / own
