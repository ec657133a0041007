"""Fine-tune a LoRA for each of many people at once (DreamBooth, Ruiz et al. 2023, without prior images).

All start from the same LoRA and take momentum steps under one fixed diagonal preconditioner. Adam's own second moments
would turn coordinates with little gradient into a random walk, and a space learned from such weights learns that walk.
Nothing here knows of pictures or models: the caller's loss does.

Letters: N people, P numbers per LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..lora.layout import Layout
from ..rates import half_cosine

# Weights [N, P] and the number of a step -> the SUM over people of their losses, so that the gradient of one person
# does not depend on how many share a batch.
PeopleLoss = Callable[[Tensor, int], Tensor]


class Descent(Protocol):
    """How steps are taken; what a training's own configuration must tell."""

    @property
    def steps(self) -> int:
        """How many."""

    @property
    def learning_rate(self) -> float:
        """Of a coordinate with average gradient; decays to zero along a half cosine."""
        ...

    @property
    def momentum(self) -> float:
        """Share of the last step that the next one keeps."""

    @property
    def clip(self) -> float:
        """Largest norm of a step, in multiples of the pilot's average."""
        ...

    @property
    def average_from(self) -> float:
        """The result is the mean of the weights over the rest of the run, from this share of the steps on."""
        ...


@dataclass(frozen=True)
class Start:
    """What all LoRAs share: where they start, and how steps are scaled."""

    vector: Tensor  # [P]
    preconditioner: Tensor  # [P] root mean square gradient of the pilot, floored
    norm: float  # average norm of a preconditioned gradient, the unit of Descent.clip


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


def measure_start(loss: PeopleLoss, vector: Tensor, people: int, *, batches: int = 8) -> Start:
    """The preconditioner at ``vector`` [P]: root mean square gradient over pilot people, plus 0.3 of its mean.

    The floor keeps coordinates without gradient from being blown up into noise.
    """
    weights = vector.expand(people, -1).clone().requires_grad_(True)
    squares = torch.zeros_like(vector)
    gradients = []
    for step in range(batches):
        (gradient,) = torch.autograd.grad(loss(weights, step), weights)
        gradients.append(gradient)
        squares += gradient.square().mean(0) / batches
    root = squares.sqrt()
    preconditioner = root + 0.3 * root.mean()
    norm = torch.stack([(g / preconditioner).norm(dim=1).mean() for g in gradients]).mean()
    return Start(vector, preconditioner, norm.item())


def train_people(
    loss: PeopleLoss,
    people: int,
    start: Start,
    config: Descent,
    *,
    callback: Callable[[int, float], None] = lambda step, loss: None,
    descent: Momentum | None = None,
) -> Tensor:
    """Fine-tune a LoRA for each of ``people`` -> vectors [N, P].

    ``callback`` gets the step and a person's mean loss. A ``descent`` that took some of the steps already goes on.
    """
    descent = descent or Momentum(start.vector.expand(people, -1), start, config)
    for step in range(descent.taken, config.steps):
        weights = descent.weights.requires_grad_(True)
        value = loss(weights, step)
        (gradient,) = torch.autograd.grad(value, weights)
        descent.step(gradient)
        callback(step + 1, value.item() / people)
    return descent.mean()


class Momentum:
    """The steps of a training: momentum under the shared preconditioner, clipped, with a rate that decays to zero."""

    def __init__(self, weights: Tensor, start: Start, config: Descent) -> None:
        self.weights, self._start, self._config = weights.clone(), start, config  # [N, P]
        self._velocity, self._sum = torch.zeros_like(weights), torch.zeros_like(weights)
        self.taken = self._summed = 0  # steps; of them, those in the sum

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
        rate = config.learning_rate * half_cosine(self.taken / config.steps)
        self.weights = self.weights.detach() - rate * self._velocity * bound
        if self.taken >= int(config.average_from * config.steps):
            self._sum, self._summed = self._sum + self.weights, self._summed + 1
        self.taken += 1

    def mean(self) -> Tensor:
        """Mean [N, P] of the weights over the last part of the run."""
        return self._sum / self._summed

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers from which ``restore`` goes on, bit by bit."""
        tensors = {"weights": self.weights.detach(), "velocity": self._velocity, "sum": self._sum}
        return tensors, {"taken": self.taken, "summed": self._summed}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up the ``state`` of a descent with the same settings, on the device of this one."""
        place = self.weights.device
        self.weights, self._velocity, self._sum = (
            tensors[name].to(place) for name in ("weights", "velocity", "sum")
        )
        self.taken, self._summed = int(numbers["taken"]), int(numbers["summed"])
