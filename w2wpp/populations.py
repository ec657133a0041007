"""Crowds compared: whether sampled people are spread as real ones are, and whether anybody was copied.

Nothing here has a zero of its own: a distance that is estimated without bias is zero in the mean for two crowds of one
kind, and comes with its standard error; shares of neighbours come with what real people reach among each other.

Letters: N, M people of two crowds, D numbers that describe a person.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DataError
from .metrics import Estimate, estimate

NEIGHBOURS = 5  # k of Naeem et al. 2020
SPLITS = 20  # of the real crowd into halves, for what it reaches against itself
FEWEST = 4  # people of whom a crowd can be halved


@dataclass(frozen=True, eq=False)
class Distance:
    """An estimated distance between crowds, and what each person contributes to its error."""

    value: float
    first: Tensor  # [N] influence of each person of the first crowd, of mean zero
    second: Tensor  # [M] the same of the second

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(_variance_of_mean(self.first) + _variance_of_mean(self.second))

    def estimate(self) -> Estimate:
        """With the normal 95 % interval; the count is that of the smaller crowd."""
        half = 1.96 * self.error
        count = min(len(self.first), len(self.second))
        return Estimate(self.value, self.value - half, self.value + half, count)


def energy_distance(first: Tensor, second: Tensor) -> Distance:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| between crowds [N, D] and [M, D], without bias (Szekely & Rizzo 2013, eq. 1).

    Means over pairs of different people, so that the expectation is zero for two samples of one distribution, and an
    estimate may be negative. The error is that of the U-statistic's first-order projection (Hoeffding 1948).
    """
    _check(first, second)
    x, y = first.double(), second.double()
    across = torch.cdist(x, y)
    within_x, within_y = _means_to_others(x), _means_to_others(y)
    value = 2 * across.mean() - within_x.mean() - within_y.mean()
    mine = 2 * (across.mean(1) - within_x)
    theirs = 2 * (across.mean(0) - within_y)
    return Distance(value.item(), mine - mine.mean(), theirs - theirs.mean())


def ratio_of_distances(first: Distance, second: Distance) -> Estimate:
    """first / second for two crowds against the same third, the ``second`` of both; 95 % interval by the delta method.

    What the shared crowd does to both cancels. Where the second distance is not clearly above zero (by two errors) the
    ratio means nothing, and its interval is unbounded.
    """
    if len(first.second) != len(second.second):
        raise DataError(
            "Distances are compared that were measured against one crowd. Got crowds of "
            f"{len(first.second)} and {len(second.second)}."
        )
    ratio = first.value / second.value if second.value else math.nan
    count = len(first.second)
    if second.value < 2 * second.error:
        return Estimate(ratio, -math.inf, math.inf, count)
    shared = first.second - ratio * second.second
    variance = (
        _variance_of_mean(first.first)
        + ratio**2 * _variance_of_mean(second.first)
        + _variance_of_mean(shared)
    )
    half = 1.96 * math.sqrt(variance) / second.value
    return Estimate(ratio, ratio - half, ratio + half, count)


def floor_of(crowd: Tensor, *, splits: int = SPLITS, seed: int = 0) -> Estimate:
    """Energy distances between random halves of one crowd [N, D]: their mean, and the range of 95 % of them.

    Halves are smaller than the crowd, so that the range is wider than that of two crowds of its size.
    """
    values = torch.tensor(
        [energy_distance(a, b).value for a, b in _halves(crowd, splits, seed)], dtype=torch.float64
    )
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(values, ends).tolist()
    return Estimate(values.mean().item(), low, high, len(crowd))


def coverage(sampled: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> Tensor:
    """[M] whether anybody sampled [N, D] is as near to a real person [M, D] as the k-th nearest real one (Naeem et al.
    2020, eq. 4); the mean is the share of real people who are covered."""
    return _inside(sampled, real, neighbours).any(0).double()


def density(sampled: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> Tensor:
    """[N] of how many real people's neighbourhoods somebody sampled [N, D] lies in, over k (Naeem et al. 2020, eq. 3);
    the mean is one where the crowds are alike, and more where the sampled stay where the real ones are densest."""
    return _inside(sampled, real, neighbours).sum(1).double() / neighbours


def neighbourhoods(
    real: Tensor, sampled: Tensor | None = None, *, splits: int = SPLITS, seed: int = 0
) -> dict[str, float]:
    """Coverage and density of one half of the real crowd [N, D] by as many sampled people [M, D], in the mean over
    random halves; without sampled people by the other half, which is what real people reach.

    Coverage rises with the number of people, so that only equal numbers compare. Where a half is smaller than the usual
    number of neighbours, all of it counts.
    """
    found, generator = [], torch.Generator().manual_seed(seed)
    for one, other in _halves(real, splits, seed):
        if sampled is not None:
            other = sampled[torch.randperm(len(sampled), generator=generator)[: len(other)]]
        k = min(NEIGHBOURS, len(one) - 1)
        shares = (f(other, one, neighbours=k).mean() for f in (coverage, density))
        found.append([float(share) for share in shares])
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("coverage", "density"), means))


def bimodality(values: Tensor) -> float:
    """Sarle's coefficient of values [N], (skewness^2 + 1) / kurtosis: 1 for two points, 5/9 for an even spread, 1/3 for
    a Gaussian (Pfister et al. 2013, eq. 1, without its corrections for few values)."""
    x = values.double() - values.double().mean()
    spread = x.square().mean()
    if len(x) < FEWEST or not spread > 0:
        return math.nan
    skewness = x.pow(3).mean() / spread.pow(1.5)
    kurtosis = x.pow(4).mean() / spread.square()
    return float((skewness.square() + 1) / kurtosis)


def modes_of(values: Tensor) -> tuple[float, float]:
    """Centres of the two groups of values [N] that leave the least variance within: one-dimensional 2-means, exact."""
    x = values.double().sort().values
    if len(x) < FEWEST:
        raise DataError(f"Two modes are sought among {FEWEST} people or more. Got {len(x)}.")
    below = x.cumsum(0)[:-1]
    count = torch.arange(1, len(x), dtype=x.dtype)
    low, high = below / count, (x.sum() - below) / (len(x) - count)
    # The variance within is that of all less what lies between, so the gap between groups decides.
    best = int((count * (len(x) - count) * (high - low).square()).argmax())
    return float(low[best]), float(high[best])


def undecided(values: Tensor, modes: tuple[float, float]) -> Tensor:
    """[N] whether a value lies in the middle half between two modes: half-drawn glasses, neither on nor off."""
    low, high = modes
    place = (values.double() - low) / max(high - low, 1e-12)
    return ((place > 0.25) & (place < 0.75)).double()


def difference_estimate(first: Tensor, second: Tensor) -> Estimate:
    """Mean of values [N] less the mean of others [M] of other people, with the normal 95 % interval."""
    one, two = estimate(first), estimate(second)
    gap = one.mean - two.mean
    half = math.hypot(one.high - one.mean, two.high - two.mean)
    return Estimate(gap, gap - half, gap + half, min(one.count, two.count))


def _halves(crowd: Tensor, splits: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    if len(crowd) < FEWEST:
        raise DataError(f"A crowd of {FEWEST} people or more can be halved. Got {len(crowd)}.")
    generator = torch.Generator().manual_seed(seed)
    half = len(crowd) // 2
    orders = [torch.randperm(len(crowd), generator=generator) for _ in range(splits)]
    return [(crowd[order[:half]], crowd[order[half:]]) for order in orders]


def _means_to_others(crowd: Tensor) -> Tensor:
    """Mean distance [N] of each person to all others."""
    return torch.cdist(crowd, crowd).sum(1) / (len(crowd) - 1)


def _inside(sampled: Tensor, real: Tensor, neighbours: int) -> Tensor:
    """[N, M] whether a sampled person lies no farther from a real one than their k-th neighbour."""
    _check(sampled, real)
    if not 1 <= neighbours < len(real):
        raise DataError(
            f"{len(real)} real people have 1 to {len(real) - 1} neighbours each. Got {neighbours}."
        )
    x, y = sampled.double(), real.double()
    radius = (
        torch.cdist(y, y).kthvalue(neighbours + 1, dim=1).values
    )  # everyone is their own nearest
    return torch.cdist(x, y) <= radius


def _variance_of_mean(influence: Tensor) -> float:
    return float(influence.var() / len(influence))


def _check(first: Tensor, second: Tensor) -> None:
    shapes = list(first.shape), list(second.shape)
    fits = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not fits or min(len(first), len(second)) < 2:
        raise DataError(
            f"Crowds are [N, D] and [M, D], of two people or more. Got {shapes[0]} and {shapes[1]}."
        )
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise DataError("These people's numbers hold NaN or infinite ones.")
