"""Batched DreamBooth: fine-tune a LoRA for each of many people at once (Ruiz et al. 2023, without prior images).

All people are photographed under one protocol: the same conditions, visited in the same order, with the same noise and
timesteps, so that two LoRAs differ only by whom they show. All start from the same LoRA and take momentum steps under
one fixed diagonal preconditioner. Adam's own second moments would turn coordinates with little gradient into a random
walk, and a space learned from such weights learns that walk. ``conditions="own"`` gives every person conditions and
noise of their own, as in the data of weights2weights: the harder, more realistic set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lora.layout import Layout
from ..world.base import AvatarBase
from ...lora.hooks import loras_applied
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


@dataclass(frozen=True)
class Start:
    """What all LoRAs share: where they start, and how steps are scaled."""

    vector: Tensor  # [P]
    preconditioner: Tensor  # [P] root mean square gradient of the pilot, floored
    norm: float  # average norm of a preconditioned gradient, the unit of DreamBooth.clip


def initial_vector(layout: Layout, *, seed: int = 3) -> Tensor:
    """[P]: A from one shared seed with unit output on unit input, B zero (Hu et al. 2021)."""
    generator = torch.Generator().manual_seed(seed)
    lora = {
        module.name: (
            torch.randn(layout.rank, module.in_features, generator=generator)
            / math.sqrt(module.in_features),
            torch.zeros(module.out_features, layout.rank),
        )
        for module in layout.modules
    }
    return layout.pack(lora)


def measure_start(
    base: AvatarBase,
    layout: Layout,
    identity: Tensor,
    vector: Tensor,
    config: DreamBooth,
    *,
    batches: int = 8,
) -> Start:
    """The preconditioner at ``vector`` [P]: root mean square gradient over pilot people, plus 0.3 of its mean.

    The floor keeps coordinates without gradient from being blown up into noise.
    """
    stream = _Photographs(identity, config)
    weights = vector.expand(len(identity), -1).clone().requires_grad_(True)
    squares = torch.zeros_like(vector)
    gradients = []
    for step in range(batches):
        loss = _loss(base, layout, weights, *stream.batch(step))
        (gradient,) = torch.autograd.grad(loss, weights)
        gradients.append(gradient)
        squares += gradient.square().mean(0) / batches
    root = squares.sqrt()
    preconditioner = root + 0.3 * root.mean()
    norm = torch.stack([(g / preconditioner).norm(dim=1).mean() for g in gradients]).mean()
    return Start(vector, preconditioner, norm.item())


def train_loras(
    base: AvatarBase,
    layout: Layout,
    identity: Tensor,
    start: Start,
    config: DreamBooth,
    *,
    index: Tensor | None = None,
    callback: Callable[[int, float], None] = lambda step, loss: None,
) -> Tensor:
    """Fine-tune a LoRA for each identity [N, 20] -> vectors [N, P].

    ``index`` [N] numbers the people, so that own conditions do not depend on how people are grouped into batches.
    """
    stream = _Photographs(identity, config, index)
    descent = Momentum(start.vector.expand(len(identity), -1), start, config)
    for step in range(config.steps):
        weights = descent.weights.requires_grad_(True)
        loss = _loss(base, layout, weights, *stream.batch(step))
        (gradient,) = torch.autograd.grad(loss, weights)
        descent.step(gradient)
        callback(step + 1, loss.item() / len(identity))
    return descent.mean()


class Momentum:
    """The steps of a training: momentum under the shared preconditioner, clipped, with a rate that decays to zero."""

    def __init__(self, weights: Tensor, start: Start, config: DreamBooth) -> None:
        self.weights, self._start, self._config = weights.clone(), start, config  # [N, P]
        self._velocity, self._sum = torch.zeros_like(weights), torch.zeros_like(weights)
        self._taken = self._summed = 0

    def step(self, gradient: Tensor) -> None:
        """gradient [N, P] at ``weights``."""
        config = self._config
        self._velocity = (
            config.momentum * self._velocity
            + (1 - config.momentum) * gradient / self._start.preconditioner
        )
        # A single bad batch may not throw a LoRA off its path.
        length = self._velocity.norm(dim=1, keepdim=True).clamp_min(1e-12)
        bound = (config.clip * self._start.norm / length).clamp_max(1.0)
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self._taken / config.steps))
        self.weights = self.weights.detach() - rate * self._velocity * bound
        if self._taken >= int(config.average_from * config.steps):
            self._sum, self._summed = self._sum + self.weights, self._summed + 1
        self._taken += 1

    def mean(self) -> Tensor:
        """Mean [N, P] of the weights over the last part of the run."""
        return self._sum / self._summed


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
    with torch.autocast("cpu", torch.bfloat16), loras_applied(base.unet, layout, weights):
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
