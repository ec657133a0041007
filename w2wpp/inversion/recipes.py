"""What each method does by itself, from the guess of a start network and from a space's average person.

Both were chosen on people whom no figure scores (benchmarks/results/inversion-tried.md); those from the average person
are longer, and of these only `adam` was tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError, check_finite
from ..identity import Identity
from ..space import Space
from .adam import Adam
from .cma import Cma
from .multistart import Multistart
from .optimiser import Optimiser
from .pivotal import Pivotal
from .reread import check_reread


@dataclass(frozen=True)
class Recipe:
    """How a picture is inverted, whatever the space."""

    optimiser: Optimiser
    steps: int
    objective: dict[str, Any] = field(default_factory=lambda: {"draws": 8})  # keywords of Objective
    pivotal: Pivotal | None = None
    start: str = "amortised"  # or "mean"
    keep: str = "best"  # what invert returns; under fresh noise "last" needs no comparisons
    # Steps go only along what shows: directions of at least this share of the strongest one's energy; 0 is all.
    shown: float = 0.0
    rereads: int = 0  # how often the start is painted, read and moved by the difference
    reread_rate: float = 0.7  # by which share of it

    def __post_init__(self) -> None:
        check_finite("A recipe", shown=self.shown, reread_rate=self.reread_rate)
        if not 0 <= self.shown <= 1:
            raise ConfigError(f"What shows is a share from 0 to 1. Got {self.shown}.")
        check_reread(self.rereads, self.reread_rate)

    def adjusted(
        self,
        *,
        steps: int | None = None,
        draws: int | None = None,
        rate: float | None = None,
        prior: float | None = None,
        pivotal: float | None = None,  # share of the steps
    ) -> Recipe:
        """The same recipe with some of its numbers replaced."""
        numbers = {"rate": rate, "prior": prior, "pivotal": pivotal}
        check_finite("A recipe", **{k: v for k, v in numbers.items() if v is not None})
        given = {"draws": draws, "prior": prior}
        objective = {**self.objective, **{k: v for k, v in given.items() if v is not None}}
        count = self.steps if steps is None else steps
        share = self.pivotal_share if pivotal is None else pivotal
        pivotal_steps = round(share * count)
        stage = replace(self.pivotal or Pivotal(), steps=pivotal_steps) if pivotal_steps else None
        optimiser = self.optimiser if rate is None else self.optimiser.with_rate(rate)
        return replace(self, optimiser=optimiser, steps=count, objective=objective, pivotal=stage)

    def __str__(self) -> str:
        more = f", along what shows by {self.shown:g}" if self.shown else ""
        more += f", {self.rereads} times read again" if self.rereads else ""
        return (
            f"{self.steps} steps of {self.draws} noised pictures, {self.optimiser}, prior "
            f"{self.objective.get('prior', 0.0):g}, pivotal {self.pivotal_share:g}{more}"
        )

    @property
    def draws(self) -> int:
        """Noised pictures of each step."""
        return int(self.objective["draws"])

    @property
    def fresh(self) -> bool:
        """Whether every step has other noise, so that losses of different steps do not compare."""
        return bool(self.objective.get("fresh", False))

    @property
    def gradients(self) -> bool:
        """Whether any step wants gradients."""
        return self.optimiser.gradients or self.pivotal is not None

    @property
    def pivotal_share(self) -> float:
        """Steps of the pivotal stage, as a share of the others."""
        return self.pivotal.steps / self.steps if self.pivotal else 0.0


# From a start network's guess of the person.
FROM_GUESS = {
    "adam": Recipe(Adam(lr=0.02), 12, {"draws": 8, "fresh": True}, keep="last"),
    "cma": Recipe(Cma(population=8, sigma=0.05), 8, {"draws": 4}),
    "multistart": Recipe(
        Multistart(spread=0.05, scales=(0.9, 1.1), adam=Adam(lr=0.02)),
        12,
        {"draws": 8, "fresh": True},
        keep="last",
    ),
}
# The loss on the noise, and another draw in every step: that of weights2weights, with a rate that falls to zero.
_PAPER = {"fresh": True, "weighting": "eps"}
# From the average person of a space.
FROM_AVERAGE = {
    "adam": Recipe(Adam(lr=0.1), 400, {"draws": 1, **_PAPER}, None, "mean", "last"),
    "cma": Recipe(Cma(sigma=0.3), 80, {"draws": 8, "prior": 1e-4}, None, "mean"),
    "multistart": Recipe(
        Multistart(adam=Adam(lr=0.1)), 100, {"draws": 4, **_PAPER}, None, "mean", "last"
    ),
}
METHODS = tuple(FROM_AVERAGE)
OLDER_NAMES = {"hybrid": "multistart"}  # in saved graphs and scripts


def recipe_for(space: Space, method: str, start: Identity | None = None) -> Recipe:
    """The method's recipe: a short one where the space guesses the person from their picture.

    A start that somebody brings may lie anywhere, so it gets the long one. Raises ConfigError for an unknown method.
    """
    method = OLDER_NAMES.get(method, method)
    if method not in METHODS:
        raise ConfigError(f"The methods are {', '.join(METHODS)}. Got {method!r}.")
    return (FROM_GUESS if start is None and space.start is not None else FROM_AVERAGE)[method]
