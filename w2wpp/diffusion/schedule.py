"""The noise schedule of a diffusion model, and what its predictions are worth at each timestep.

A schedule has T timesteps, from the least noise to the most. Whatever the family of models, noisy pictures and what a
model should predict are sums of the picture and the noise, so that the prediction tells the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

PREDICTIONS = ("eps", "v_prediction")
WEIGHTINGS = ("native", "eps", "v", "x0", "min-snr")
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


class Schedule(Protocol):
    """What an inversion and the sampler ask of a noise schedule."""

    @property
    def prediction(self) -> str:
        """What the model predicts, by name."""
        ...

    def __len__(self) -> int:
        """T."""
        ...

    def scales(self, timestep: int) -> tuple[float, float]:
        """Of the picture and of the noise in a noisy picture."""
        ...

    def clean(self, noisy: Tensor, output: Tensor, timestep: int) -> Tensor:
        """The picture that a prediction means: noisy and output [N, C, H, W] -> x0 [N, C, H, W]."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """x0, noise [N, C, H, W], timestep [N] -> noisy pictures and the target of the prediction."""
        ...

    def weights(self, weighting: str) -> Tensor:
        """[T]: what the squared error of a prediction is multiplied by; one of WEIGHTINGS."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """All that decides it, but for the name of the prediction."""
        ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alphas_cumprod [T] of a discrete schedule, and what the model predicts: noise or v."""

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

    def clean(self, noisy: Tensor, output: Tensor, timestep: int) -> Tensor:
        """The picture that a prediction means: noisy and output [N, C, H, W] -> x0 [N, C, H, W]."""
        alpha, sigma = self.scales(timestep)
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
        abar = self.alphas_cumprod.double()
        snr = abar / (1 - abar)
        return _weights(weighting, snr, snr if self.prediction == "eps" else snr + 1)

    def tensors(self) -> dict[str, Tensor]:
        """alphas_cumprod."""
        return {"alphas_cumprod": self.alphas_cumprod}


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """Any schedule, by what stands in its noisy pictures and in the targets of its predictions.

    noisy [T, 2] and target [T, 2]: how much of the picture and of the noise. Flow matching (Lipman et al. 2023, Liu et
    al. 2023) at the noise s, for one, has the noisy pictures (1 - s) x0 + s noise and the target noise - x0.
    """

    noisy: Tensor
    target: Tensor
    prediction: str = "linear"

    def __post_init__(self) -> None:
        shapes = list(self.noisy.shape), list(self.target.shape)
        fits = self.noisy.ndim == 2 and self.noisy.shape[1] == 2 and len(self.noisy)
        if not fits or shapes[0] != shapes[1]:
            raise ShapeError(
                f"A schedule's noisy pictures and targets are [T, 2]. Got {shapes[0]} and {shapes[1]}."
            )
        if not bool(torch.isfinite(torch.cat([self.noisy, self.target])).all()):
            raise ConfigError("A schedule holds NaN or infinite numbers.")
        if bool((self.noisy[:, 1] == 0).any()) or bool((self._determinant == 0).any()):
            raise ConfigError(
                "This is no schedule of a denoising model: some of its noisy pictures hold no noise, or its "
                "predictions do not tell the picture."
            )

    def __len__(self) -> int:
        return len(self.noisy)

    def scales(self, timestep: int) -> tuple[float, float]:
        """Of the picture and of the noise in a noisy picture."""
        picture, noise = self.noisy[timestep].tolist()
        return picture, noise

    def clean(self, noisy: Tensor, output: Tensor, timestep: int) -> Tensor:
        """The picture that a prediction means: noisy and output [N, C, H, W] -> x0 [N, C, H, W]."""
        # Two equations for picture and noise, by Cramer's rule.
        whole = float(self._determinant[timestep])
        of_noisy, of_output = float(self.target[timestep, 1]), -float(self.noisy[timestep, 1])
        return of_noisy / whole * noisy + of_output / whole * output

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """x0, noise [N, C, H, W], timestep [N] -> noisy pictures and the target of the prediction."""
        shape = (2, -1, *([1] * (x0.ndim - 1)))
        for_noisy, for_target = (
            table.to(timestep.device)[timestep].to(x0).T.reshape(shape)
            for table in (self.noisy, self.target)
        )
        return (
            for_noisy[0] * x0 + for_noisy[1] * noise,
            for_target[0] * x0 + for_target[1] * noise,
        )

    def weights(self, weighting: str) -> Tensor:
        """[T]: the factor that turns the squared error of the prediction into that of another parametrisation."""
        picture, noise = self.noisy.double().T
        snr = (picture / noise).square()
        return _weights(weighting, snr, (self._determinant / noise).square())

    def tensors(self) -> dict[str, Tensor]:
        """Both tables."""
        return {"noisy": self.noisy, "target": self.target}

    @property
    def _determinant(self) -> Tensor:
        """[T]"""
        noisy, target = self.noisy.double(), self.target.double()
        return noisy[:, 0] * target[:, 1] - noisy[:, 1] * target[:, 0]


def _weights(weighting: str, snr: Tensor, native: Tensor) -> Tensor:
    """[T] for a model whose own squared error weighs the one of x0 by `native`, at signal-to-noise ratios `snr`."""
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"Weightings of the loss are {', '.join(WEIGHTINGS)}. Got {weighting!r}.")
    factors = {
        "eps": snr,
        "v": snr + 1,
        "x0": torch.ones_like(snr),
        "min-snr": snr.clamp(max=MIN_SNR_GAMMA),
    }
    return torch.ones_like(snr) if weighting == "native" else factors[weighting] / native
