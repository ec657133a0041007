"""CMA-ES on a latent, by pycma (Hansen 2016): losses only, for machines without memory for gradients.

The covariance is diagonal ("separable", Ros & Hansen 2008), or full in the first `subspace` coordinates, which carry
most of what tells people apart in a space whose latents are sorted by variance. The population shares its noise
and timesteps, goes through the UNet as one batch, and the mean is returned, which averages the noise out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

MODES = ("separable", "subspace", "full")


@dataclass(frozen=True)
class Cma:
    population: int = 8
    mode: str = "separable"
    sigma: float = 0.3  # first step size; latents have unit deviation
    subspace: int = 16  # coordinates that move in mode "subspace"
    restarts: int = 0  # from the start again with twice the population (IPOP, Auger & Hansen 2005)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"CMA-ES runs {', '.join(MODES)}. Got {self.mode!r}.")
        if self.population < 3 or self.sigma <= 0 or self.subspace < 2 or self.restarts < 0:
            raise ConfigError(
                "CMA-ES wants a population of three or more, a positive sigma, at least two "
                f"coordinates and no negative number of restarts. Got {self}."
            )

    def begin(self, start: Tensor, *, steps: int, seed: int) -> CmaRun:
        return CmaRun(self, start, steps, seed)


class CmaRun:
    gradients = False

    def __init__(self, settings: Cma, start: Tensor, steps: int, seed: int) -> None:
        self.settings, self.start, self.seed = settings, start.detach().clone(), seed
        self.told: list[
            Tensor
        ] = []  # losses of every step [R]: asking again and telling them resumes
        self._per_run = max(1, -(-steps // (settings.restarts + 1)))
        self._launch(0)

    @property
    def stage(self) -> str:
        return f"cma, run {self._run + 1}" if self.settings.restarts else "cma"

    @property
    def width(self) -> int:
        """How many coordinates move."""
        d = self.start.shape[1]
        return min(self.settings.subspace, d) if self.settings.mode == "subspace" else d

    def ask(self) -> Tensor:
        if len(self.told) == self._per_run * (self._run + 1) and self._run < self.settings.restarts:
            self._launch(self._run + 1)
        self._asked = [es.ask() for es in self._strategies]
        moving = torch.from_numpy(np.array(self._asked)).to(self.start)  # [B, population, width]
        return self._full(moving).flatten(0, 1)

    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        self.told.append(losses.detach().cpu().double())
        values = self.told[-1].unflatten(0, (len(self.start), -1))
        for es, asked, row in zip(self._strategies, self._asked, values.tolist()):
            es.tell(asked, row)

    def result(self) -> Tensor:
        means = np.array([es.mean for es in self._strategies])
        return self._full(torch.from_numpy(means).to(self.start)[:, None])[:, 0]

    def state(self) -> dict[str, Tensor]:
        return {f"told.{i}": losses for i, losses in enumerate(self.told)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for i in range(len(state)):
            self.ask()
            self.tell(state[f"told.{i}"], None)

    def _full(self, moving: Tensor) -> Tensor:
        """[B, n, width] -> [B, n, D], the rest as it was at the start."""
        rest = self.start[:, None, self.width :].expand(-1, moving.shape[1], -1)
        return torch.cat([moving, rest], dim=2)

    def _launch(self, run: int) -> None:
        self._run = run
        self._strategies = [self._strategy(run, person) for person in range(len(self.start))]

    def _strategy(self, run: int, person: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its optional plots
            import cma  # slow to import, and only needed here
        # Its own generator: pycma uses and seeds numpy's global one otherwise.
        random = np.random.RandomState((self.seed * 1009 + person * 31 + run) % 2**32)
        options = {
            "popsize": self.settings.population * 2**run,
            "CMA_diagonal": self.settings.mode == "separable",
            "randn": lambda *size: random.standard_normal(size),
            "seed": np.nan,
            "verbose": -9,
            "verb_log": 0,
        }
        x0 = self.start[person, : self.width].double().cpu().numpy()
        return cma.CMAEvolutionStrategy(x0, self.settings.sigma, options)
