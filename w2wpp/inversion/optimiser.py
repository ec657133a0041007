"""What every optimiser is: settings that start a run, and a run that asks and is told.

B people are optimised side by side, each as if alone; D is the size of what is searched for.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Run(Protocol):
    """One optimisation. `ask` gives candidates, ordered by person; `tell` takes their losses."""

    @property
    def gradients(self) -> bool:
        """Whether the next `tell` wants gradients."""

    @property
    def stage(self) -> str:
        """A word for the user."""

    def ask(self) -> Tensor:
        """Candidates [R, D], R a multiple of B."""

    def tell(self, losses: Tensor, gradients: Tensor | None) -> None:
        """losses [R], gradients [R, D] of the candidates asked for last."""

    def result(self) -> Tensor:
        """Where the run stands: [B, D]."""

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here in a new run."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave in another run of the same settings."""


class Optimiser(Protocol):
    """Settings. The same seed gives the same run."""

    @property
    def gradients(self) -> bool:
        """Whether a run of it ever wants gradients: without, the model needs no memory for them."""

    def with_rate(self, rate: float) -> Optimiser:
        """The same, but for how far a step goes."""

    def begin(self, start: Tensor, *, steps: int, seed: int) -> Run:
        """Start at [B, D]."""
