"""DreamBooth in the miniature world: what its LoRAs are trained on.

All people are photographed under one protocol: the same scenes, visited in the same order, with the same noise and
timesteps, so that two LoRAs differ only by whom they show. ``conditions="own"`` gives every person scenes and noise of
their own, as in the data of weights2weights: the harder, more realistic set. Steps are those of ``training.people``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...precision import quick_products
from ...training.people import PeopleLoss
from .base import AvatarBase
from .renderer import render
from .scene import WORDS, Scene, face_weights, sample_scenes
from .vae import AvatarVae


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
    face_share: float = 0.6  # of the loss, as with masked training; the rest is spread evenly
    conditions: Literal["common", "own"] = "common"


def people_loss(
    base: AvatarBase,
    vae: AvatarVae,
    layout: Layout,
    identity: Tensor,
    config: DreamBooth,
    index: Tensor | None = None,
) -> PeopleLoss:
    """The loss of identities [N, 20], for ``train_people``.

    ``index`` [N] numbers the people, so that own conditions do not depend on how people are grouped into batches.
    """
    album = Photographs(identity, config, vae, index)

    def loss(weights: Tensor, step: int) -> Tensor:
        latents, words, weight, noise, timestep = album.batch(step)
        noisy, target = base.schedule.add_noise(latents, noise, timestep)
        with quick_products(), loras_applied(base.unet, layout, weights):
            output = base(noisy, timestep, base.prompt(words))
        return (weight * (output.float() - target).square()).mean() * len(weights)

    return loss


class Photographs:
    """The pictures of N people, and the order, noise and timesteps in which training meets them."""

    def __init__(
        self,
        identity: Tensor,
        config: DreamBooth,
        vae: AvatarVae,
        index: Tensor | None = None,
    ) -> None:
        self.config, self.count = config, len(identity)
        self.index = torch.arange(self.count) if index is None else index
        own = config.conditions == "own"
        shots = [self._scenes(int(person)) for person in (self.index if own else self.index[:1])]
        shots = shots if own else shots * self.count
        joined = Scene(*(torch.cat([getattr(s, f.name) for s in shots]) for f in fields(Scene)))
        size = config.photographs
        pictures = render(identity.repeat_interleave(size, 0), joined)
        with torch.no_grad():
            latents = torch.cat([vae.encode(part) for part in pictures.split(64)])
        self.latents = latents.unflatten(0, (self.count, size))
        self.words = joined.words().unflatten(0, (self.count, size))
        weights = face_weights(joined, latents.shape[-1], config.face_share)
        self.weights = weights.unflatten(0, (self.count, size))

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a step is about, ordered by person.

        Latents [N*M, 4, h, w], words [N*M, 4], weights of the loss [N*M, 1, h, w], noise and timesteps [N*M].
        """
        own = self.config.conditions == "own"
        draws = [
            self._draw(step, int(person)) for person in (self.index if own else self.index[:1])
        ]
        draws = draws if own else draws * self.count
        shots, noise, timestep = (torch.stack(part) for part in zip(*draws))
        rows = torch.arange(self.count)[:, None]
        return (
            self.latents[rows, shots].flatten(0, 1),
            self.words[rows, shots].flatten(0, 1),
            self.weights[rows, shots].flatten(0, 1),
            noise.flatten(0, 1),
            timestep.flatten(),
        )

    def _scenes(self, person: int) -> Scene:
        """Scenes with balanced words in shuffled order, poses from the person's generator."""
        size = self.config.photographs
        generator = self._generator(0, person)
        drawn = sample_scenes(size, generator=generator)
        words = {
            slot: torch.randperm(size, generator=generator) % len(choices)
            for slot, choices in WORDS.items()
        }
        return Scene(**words, pose=drawn.pose, jitter=drawn.jitter)

    def _draw(self, step: int, person: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which photographs, which noise and which timesteps: [M], [M, 4, h, w], [M], stratified over time."""
        size, total = self.config.pictures, self.config.photographs
        generator = self._generator(1 + step, person)
        shots = (torch.arange(size) + step * size) % total
        noise = torch.randn(size, *self.latents.shape[2:], generator=generator)
        strata = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        return shots, noise, (strata / size * 1000).long()

    def _generator(self, step: int, person: int) -> torch.Generator:
        who = person + 1 if self.config.conditions == "own" else 0
        return torch.Generator().manual_seed((self.config.seed * 100_003 + who) * 100_003 + step)
