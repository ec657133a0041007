"""Batched DreamBooth: fine-tune a LoRA for each of many people at once (Ruiz et al. 2023, without prior images).

All people are photographed under one protocol: the same conditions, visited in the same order, with the same noise and
timesteps, so that two LoRAs differ only by whom they show. ``conditions="own"`` gives every person conditions and noise
of their own, as in the data of weights2weights: the harder, more realistic set. Steps are those of ``training.people``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...precision import quick_products
from ...training.people import PeopleLoss
from ..world.base import AvatarBase
from ..world.renderer import Nuisance, render, sample_nuisance


@dataclass(frozen=True)
class DreamBooth:
    """How LoRAs are trained. N people, M pictures a step."""

    seed: int = 2
    steps: int = 90
    pictures: int = 6  # M, per person and step
    photographs: int = 32  # different photographs of a person, visited in turn
    learning_rate: float = 2e-2  # of a coordinate with average gradient; decays to zero
    momentum: float = 0.9
    clip: float = 1.0  # a step's norm, in multiples of the pilot's average
    average_from: float = 0.75  # the result is the mean of the weights over the rest of the run
    conditions: Literal["common", "own"] = "common"


def people_loss(
    base: AvatarBase,
    layout: Layout,
    identity: Tensor,
    config: DreamBooth,
    index: Tensor | None = None,
) -> PeopleLoss:
    """The loss of identities [N, 20], for ``train_people``.

    ``index`` [N] numbers the people, so that own conditions do not depend on how people are grouped into batches.
    """
    stream = _Photographs(identity, config, index)
    return lambda weights, step: _loss(base, layout, weights, *stream.batch(step))


def _loss(
    base: AvatarBase,
    layout: Layout,
    weights: Tensor,
    pictures: Tensor,
    words: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> Tensor:
    """Sum over people of the mean squared error of v: gradients of a person do not depend on how many share a batch."""
    noisy, target = base.add_noise(pictures, noise, timestep)
    with quick_products(), loras_applied(base.unet, layout, weights):
        output = base(noisy, timestep, base.prompt(words))
    return F.mse_loss(output.float(), target) * len(weights)


class _Photographs:
    """The pictures of N people, and the order, noise and timesteps in which training meets them."""

    def __init__(self, identity: Tensor, config: DreamBooth, index: Tensor | None = None) -> None:
        self.config, self.count = config, len(identity)
        self.index = torch.arange(self.count) if index is None else index
        own = config.conditions == "own"
        shots = [self._nuisance(int(person)) for person in (self.index if own else self.index[:1])]
        if not own:
            shots = shots * self.count
        joined = Nuisance(
            *(torch.cat([getattr(s, f) for s in shots]) for f in Nuisance.__dataclass_fields__)
        )
        size = config.photographs
        pictures = render(identity.repeat_interleave(size, 0), joined)
        self.pictures = pictures.view(self.count, size, *pictures.shape[1:])
        self.words = joined.words().view(self.count, size, -1)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures [N*M, 3, H, W], words [N*M, 3], noise and timesteps [N*M] of a step, ordered by person."""
        own = self.config.conditions == "own"
        draws = [
            self._draw(step, int(person)) for person in (self.index if own else self.index[:1])
        ]
        if not own:
            draws = draws * self.count
        shots, noise, timestep = (torch.stack(part) for part in zip(*draws))
        rows = torch.arange(self.count)[:, None]
        return (
            self.pictures[rows, shots].flatten(0, 1),
            self.words[rows, shots].flatten(0, 1),
            noise.flatten(0, 1),
            timestep.flatten(),
        )

    def _nuisance(self, person: int) -> Nuisance:
        """Photographing conditions: balanced words in shuffled order, poses from the person's generator."""
        size = self.config.photographs
        generator = self._generator(0, person)
        drawn = sample_nuisance(size, generator=generator)

        def balanced(words: int) -> Tensor:
            return torch.randperm(size, generator=generator) % words

        return Nuisance(balanced(8), balanced(3), balanced(3), drawn.pose, drawn.jitter)

    def _draw(self, step: int, person: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which photographs, which noise and which timesteps: [M], [M, 3, H, W], [M], stratified over time."""
        size, total = self.config.pictures, self.config.photographs
        generator = self._generator(1 + step, person)
        shots = (torch.arange(size) + step * size) % total
        noise = torch.randn(size, *self.pictures.shape[2:], generator=generator)
        strata = (
            torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        ) / size
        return shots, noise, (strata * 1000).long()

    def _generator(self, step: int, person: int) -> torch.Generator:
        who = person + 1 if self.config.conditions == "own" else 0
        return torch.Generator().manual_seed((self.config.seed * 100_003 + who) * 100_003 + step)
