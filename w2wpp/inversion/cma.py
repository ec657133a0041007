"""CMA-ES on a latent, by pycma (Hansen 2016): losses only, for machines without memory for gradients.

The covariance is diagonal ("separable", Ros & Hansen 2008) or full. The population shares its noise and timesteps, goes
through the UNet as one batch, and the mean is returned, which averages the noise out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..errors import ConfigError, check_finite

MODES = ("separable", "full")


@dataclass(frozen=True)
class Cma:
    """Settings of CMA-ES; everything else is pycma's default."""

    gradients: ClassVar[bool] = False

    population: int = 8
    mode: str = "separable"
    sigma: float = 0.3  # first step size; latents have unit std

    def __post_init__(self) -> None:
        check_finite("CMA-ES", sigma=self.sigma)
        if self.mode not in MODES:
            raise ConfigError(f"CMA-ES runs {' or '.join(MODES)}. Got {self.mode!r}.")
        if self.population < 3 or self.sigma <= 0:
            raise ConfigError(
                f"CMA-ES wants a population of three or more and a positive sigma. Got {self}."
            )

    def with_rate(self, rate: float) -> Cma:
        """The std of the first population."""
        return replace(self, sigma=rate)

    def begin(self, start: Tensor, *, steps: int, seed: int) -> CmaRun:
        return CmaRun(self, start, seed)


class CmaRun:
    """One run of CMA-ES: a strategy of its own for each person."""

    gradients, stage = False, "cma"

    def __init__(self, settings: Cma, start: Tensor, seed: int) -> None:
        self.start = start.detach().clone()
        # Losses of every step [R]: asking again and telling them resumes.
        self.told: list[Tensor] = []
        self._strategies = [
            _strategy(settings, x0, seed * 1009 + person * 31)
            for person, x0 in enumerate(start.detach().double().cpu().numpy())
        ]

    def ask(self) -> Tensor:
        self._asked = [es.ask() for es in self._strategies]
        candidates = torch.from_numpy(np.array(self._asked)).to(self.start)
        return rearrange(candidates, "people population d -> (people population) d")

    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        self.told.append(losses.detach().cpu().double())
        values = rearrange(self.told[-1], "(people r) -> people r", people=len(self.start))
        for es, asked, row in zip(self._strategies, self._asked, values.tolist()):
            es.tell(asked, row)

    def result(self) -> Tensor:
        return torch.from_numpy(np.array([es.mean for es in self._strategies])).to(self.start)

    def state(self) -> dict[str, Tensor]:
        return {f"told.{i}": losses for i, losses in enumerate(self.told)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for i in range(len(state)):
            self.ask()
            self.tell(state[f"told.{i}"], None)


def _strategy(settings: Cma, x0: np.ndarray, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its optional plots
        try:
            import cma  # slow to import, and only needed here
        except ImportError as e:
            raise ConfigError(
                "The method 'cma' needs the package cma, which is not installed. Run "
                "'python -m pip install cma' with the Python that runs this, or choose the method 'adam'."
            ) from e
    # Its own generator: pycma uses and seeds numpy's global one otherwise.
    random = np.random.RandomState(seed % 2**32)
    options = {
        "popsize": settings.population,
        "CMA_diagonal": settings.mode == "separable",
        "randn": lambda *size: random.standard_normal(size),
        "seed": np.nan,
        "verbose": -9,
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(x0, settings.sigma, options)
