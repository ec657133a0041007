"""What people's LoRAs are trained on: pictures of each, met by all under one protocol.

Everybody's pictures are visited in the same order, with the same noise and at the same timesteps, so that two LoRAs
differ only by whom they show (and by what else their pictures have in common).

Letters: N people, M pictures of each in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError, DataError, ShapeError, check_finite
from .people import PeopleLoss


@dataclass(frozen=True)
class PeopleTraining:
    """How LoRAs of people are trained. The defaults were found on avatars; see docs/measurements.md."""

    seed: int = 2  # of the order, the noise and the timesteps; the same for everybody
    steps: int = 90
    pictures: int = 6  # M
    learning_rate: float = 2e-2  # of a coordinate with average gradient; decays to zero
    momentum: float = 0.9
    clip: float = 1.0  # a step's norm, in multiples of the pilot's average
    average_from: float = 0.75  # the result is the mean of the weights over the rest of the run

    def __post_init__(self) -> None:
        check_finite("A training", learning_rate=self.learning_rate)
        if self.steps < 1 or self.pictures < 1 or self.learning_rate <= 0:
            raise ConfigError(
                "A training takes at least one step, at least one picture in each, and a positive rate. Got "
                f"steps={self.steps}, pictures={self.pictures}, learning_rate={self.learning_rate}."
            )


class Album:
    """The pictures of N people as latents, [n_i, C, h, w] each, and how a training meets them.

    ``prompts`` are those of the pictures, n_i for each person, where pictures differ in theirs. What a prompt is, the
    model knows.
    """

    def __init__(
        self,
        pictures: Sequence[Tensor],
        config: PeopleTraining,
        timesteps: int,
        prompts: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        shapes = {tuple(p.shape[1:]) for p in pictures}
        if len(shapes) != 1 or any(p.ndim != 4 or not len(p) for p in pictures):
            raise ShapeError(
                "People's pictures are [n, C, h, w], n at least 1 and the rest the same for all. Got "
                f"{[list(p.shape) for p in pictures[:4]]}."
            )
        if not all(bool(torch.isfinite(p).all()) for p in pictures):
            raise DataError("The pictures to train on hold NaN or infinite numbers.")
        if prompts is not None and list(map(len, prompts)) != list(map(len, pictures)):
            raise DataError(
                f"Every picture has a prompt, or none has. Got {list(map(len, pictures))[:6]} pictures and "
                f"{list(map(len, prompts))[:6]} prompts."
            )
        self._pictures, self._config, self._timesteps = list(pictures), config, timesteps
        self._prompts = prompts

    def __len__(self) -> int:
        """N."""
        return len(self._pictures)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [N, M, C, h, w], noise [M, C, h, w] and timesteps [M] of a step, stratified over time."""
        size = self._config.pictures
        seed = self._config.seed * 100_003**2 + step
        generator = torch.Generator().manual_seed(seed)
        first = self._pictures[0]
        noise = torch.randn(size, *first.shape[1:], generator=generator)
        strata = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        pictures = torch.stack([p[self._shots(step, len(p))] for p in self._pictures])
        timestep = (strata / size * self._timesteps).long()
        return pictures, noise.to(first.device), timestep.to(first.device)

    def prompts(self, step: int) -> list[list[Any]] | None:
        """[N][M], those of the step's pictures; None where all have the same."""
        if self._prompts is None:
            return None
        return [[own[i] for i in self._shots(step, len(own)).tolist()] for own in self._prompts]

    def _shots(self, step: int, count: int) -> Tensor:
        """[M], which of a person's ``count`` pictures a step takes."""
        size = self._config.pictures
        return (torch.arange(size) + step * size) % count


def people_loss(
    album: Album,
    denoise: Denoise,
    schedule: Schedule,
    *,
    rows: int | None = None,
    under: Callable[[Sequence[Any]], Denoise] | None = None,
) -> PeopleLoss:
    """The loss of an album's people, for ``train_people``: the squared error of the prediction.

    At most ``rows`` pictures, and one of each person, go through the model at once; their graphs are freed one after
    the other, and the gradient rides on the value. ``under`` gives the model with a prompt for each row, for albums
    that have them.
    """
    at_once = max(1, (rows or len(album) * 2**20) // len(album))

    def loss(weights: Tensor, step: int) -> Tensor:
        pictures, noise, timestep = album.batch(step)
        prompts = album.prompts(step)
        count, size = pictures.shape[:2]
        total = torch.zeros((), device=weights.device)
        gradient = torch.zeros_like(weights)
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_(True)
            for part in torch.arange(size, device=noise.device).split(at_once):
                t = timestep[part].repeat(count)
                x0 = pictures[:, part].flatten(0, 1)
                noisy, target = schedule.add_noise(x0, noise[part].repeat(count, 1, 1, 1), t)
                model = denoise
                if under is not None and prompts is not None:
                    model = under([own[i] for own in prompts for i in part.tolist()])
                error = model(noisy, t, leaf).float() - target
                value = error.square().flatten(1).mean(1).sum() / size
                gradient += torch.autograd.grad(value, leaf)[0]
                total += value.detach().to(total.device)
            return total + ((weights - weights.detach()) * gradient).sum()

    return loss
