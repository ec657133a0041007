"""An attribute from marks: faces that have it, and faces that do not.

The latents of a space have unit covariance among people, for which Fisher's linear discriminant is the difference of
the two means. What the space already has attributes for is then taken out of it, as in `directions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .directions import LEAST_OWN, shortest_step

CLOSE = 0.3  # cosine from which on another attribute is worth naming


@dataclass(frozen=True, eq=False)
class Marked:
    """A step of one standard deviation of the new attribute [d], and what is known of it."""

    direction: Tensor
    plus: int
    minus: int
    own: float  # share of the difference that no other attribute explains
    right: tuple[int, int] | None  # of the marked, left out one by one, how many fall on their side
    close: Mapping[str, float]  # cosine with the readings of other attributes, where it is large

    def report(self) -> dict[str, Any]:
        """What a space file keeps of how the direction was found."""
        return {
            "method": "difference of means, de-biased",
            "unit": "one standard deviation of the attribute",
            "marked": [self.plus, self.minus],
            "own_share": round(self.own, 4),
            "left_out_right": list(self.right) if self.right else None,
            "close_to": {n: round(c, 4) for n, c in self.close.items()},
        }

    def __str__(self) -> str:
        text = f"{self.plus} faces against {self.minus}"
        if self.right:
            text += f"; left out one by one, {self.right[0]} of {self.right[1]} fall on their side"
        if self.close:
            near = ", ".join(f"{n} ({c:+.2f})" for n, c in self.close.items())
            text += f"; what separates them is in part {near}, which was taken out"
        return text


def direction_from_marks(plus: Tensor, minus: Tensor, known: Mapping[str, Tensor]) -> Marked:
    """plus [n, d] have it, minus [m, d] do not; `known` are the space's directions [d], which are left alone.

    Raises DataError where nobody is marked, the same people are, or `known` explains the difference.
    """
    if not len(plus) or not len(minus):
        raise DataError(
            f"A new attribute needs faces that have it and faces that do not. Got {len(plus)} and {len(minus)}."
        )
    difference = plus.double().mean(0) - minus.double().mean(0)
    length = float(difference.norm())
    if not length > 1e-9:
        raise DataError("The faces marked + and - are the same people; mark others.")
    beta = difference / length
    readings = _readings(known, len(beta))
    step, own = shortest_step(beta, readings)
    if own < LEAST_OWN:
        raise DataError(
            f"What separates the marked faces is {1 - own:.0%} what the space already has attributes for "
            f"({', '.join(known)}). Use those, or mark other faces."
        )
    cosines = (readings / readings.norm(dim=0)).T @ beta if known else torch.zeros(0)
    found = sorted(zip(known, cosines.tolist()), key=lambda pair: -abs(pair[1]))
    close = {name: c for name, c in found[:3] if abs(c) >= CLOSE}
    right = _left_out(plus.double(), minus.double())
    return Marked(step.float(), len(plus), len(minus), own, right, close)


def _readings(known: Mapping[str, Tensor], d: int) -> Tensor:
    """What reads each known attribute [d, A], from the steps that raise one and no other: B = D (D^T D)^-1."""
    if not known:
        return torch.zeros(d, 0, dtype=torch.float64)
    steps = torch.stack(list(known.values()), dim=1).double()
    if steps.shape[0] != d:
        raise ConfigError(f"Directions of {steps.shape[0]} latents do not belong to faces of {d}.")
    return torch.linalg.pinv(steps).T


def _left_out(plus: Tensor, minus: Tensor) -> tuple[int, int] | None:
    """How many of the marked fall on their side of the middle that the others give, and of how many."""
    if min(len(plus), len(minus)) < 2:
        return None
    sums, counts = (plus.sum(0), minus.sum(0)), (len(plus), len(minus))
    right = 0
    for side, group in enumerate((plus, minus)):
        other = sums[1 - side] / counts[1 - side]
        for z in group:
            own = (sums[side] - z) / (counts[side] - 1)
            right += bool((z - (own + other) / 2) @ (own - other) > 0)
    return right, sum(counts)
