"""Fit the map between latents and N(0, I) to the latents of training people: iterative Gaussianisation.

Few people in many dimensions: a search for odd directions always finds some. So in every round directions are sought,
and their splines fitted, on a part of the people alone, and a bend has to prove itself on the others: what does not
make them more likely is left out, and rounds end when nothing is left to gain. What is kept is fitted again to
everybody. Rounds take turns at the first 8, 16, 32, ... latents: where latents come in the order of what they matter,
the traits that come in kinds are among the first, and among few latents they are easier to find.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..flow import KNOTS, Flow, bend, orthonormal
from ..space import Space
from .coefficients import Coefficients

FEWEST = 50  # people


@dataclass(frozen=True)
class FlowTraining:
    """How a flow is fitted."""

    rounds: int = 24  # at most, those included that keep nothing
    judges: float = 0.3  # share of the people on whom a round's directions and bends are judged
    bandwidth: float = 0.6  # of the kernel density, in units of Silverman's rule
    gain: float = (
        2.0  # standard errors of its nats per person above zero that a bend must reach to be kept
    )
    patience: int = 2  # turns through all sizes without a bend that is worth it
    seed: int = 0

    def __post_init__(self) -> None:
        positive = self.rounds >= 1 and self.patience >= 1 and self.bandwidth > 0
        if not positive or not 0 < self.judges < 1:
            raise ConfigError(
                "A flow needs rounds, patience and a bandwidth above zero, and a share of judges between 0 and 1. "
                f"Got {self}."
            )


@torch.no_grad()
def with_flow(space: Space, data: Coefficients, training: FlowTraining | None = None) -> Space:
    """The space with a flow fitted to its training people's latents; directions and a start belong to it afterwards.

    Raises ConfigError where it has some already.
    """
    if space.directions or space.start is not None:
        raise ConfigError(
            f"'{space.name}' has attribute directions or a start network, which live in its latents as they are. "
            "Fit the flow first and those after it."
        )
    mean = space.codec.encode(data.values[~data.heldout]).mean
    flow, report = fit_flow((mean - space.prior_mean) / space.prior_std, training)
    if not flow.rounds:
        return replace(space, provenance={**space.provenance, "flow": report})
    return replace(space, flow=flow, provenance={**space.provenance, "flow": report})


def fit_flow(z: Tensor, training: FlowTraining | None = None) -> tuple[Flow, dict[str, Any]]:
    """Latents z [N, d] of training people, standardised -> their flow, and a report of what was gained.

    Raises DataError for too few people, or NaN.
    """
    training = training or FlowTraining()
    if z.ndim != 2 or len(z) < FEWEST or not bool(torch.isfinite(z).all()):
        raise DataError(
            f"A flow is fitted to finite latents [N, d] of {FEWEST} people or more. Got {list(z.shape)}."
        )
    generator = torch.Generator().manual_seed(training.seed)
    current, size = z.double(), z.shape[1]
    rounds, gains, idle = [], [], 0
    sizes = [*itertools.takewhile(lambda n: n < size, (8 * 2**i for i in range(20))), size]
    for number in range(training.rounds):
        judges = torch.rand(len(z), generator=generator) < training.judges
        rotation = _leading(current[~judges], sizes[number % len(sizes)], generator)
        rotation = orthonormal(rotation.half().double())  # as it will come back from a file
        turned = current @ rotation.T
        gain, error = _gain(turned, judges, training)
        kept = gain > training.gain * error
        gains.append({"bent": int(kept.sum()), "nats": round(float(gain[kept].sum()), 4)})
        idle = 0 if bool(kept.any()) else idle + 1
        if idle == training.patience * len(sizes):
            break
        if not bool(kept.any()):
            continue
        splines = _splines(turned, training.bandwidth, kept)
        current = bend(turned, *splines)[0]
        rounds.append((rotation, *splines))
    flow = Flow(size, len(rounds), KNOTS)
    for i, (rotation, x, y, slope) in enumerate(rounds):
        flow.rotation[i] = rotation.half()
        flow.x[i], flow.y[i], flow.slope[i] = x, y, slope
    report = {"rounds": len(rounds), "people": len(z), "tried": gains}
    return flow.requires_grad_(False).eval(), report


def _leading(z: Tensor, leading: int, generator: torch.Generator) -> Tensor:
    """Rotation [d, d] of the ``leading`` first latents to their odd directions; the others stay."""
    rotation = torch.eye(z.shape[1], dtype=z.dtype)
    rotation[:leading, :leading] = _odd_directions(z[:, :leading], generator)
    return rotation


def _odd_directions(z: Tensor, generator: torch.Generator, steps: int = 60) -> Tensor:
    """Rotation [d, d] to directions of z [N, d] that are least Gaussian: symmetric FastICA (Hyvarinen 1999, eq. 40).

    Latents that are not white are whitened for the search alone; its answer is made a rotation again.
    """
    size = z.shape[1]
    values, vectors = torch.linalg.eigh(torch.cov(z.T).reshape(size, size))
    white = (z - z.mean(0)) @ (vectors / values.clamp_min(1e-9).sqrt()) @ vectors.T
    weights = _turn(size, generator)
    for _ in range(steps):
        activity = torch.tanh(white @ weights.T)
        slope = (1 - activity.square()).mean(0)
        weights = _symmetric(activity.T @ white / len(white) - slope[:, None] * weights)
    return weights


def _turn(size: int, generator: torch.Generator) -> Tensor:
    """A rotation [d, d] at random."""
    draws = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return _symmetric(draws)


def _symmetric(weights: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(weights)
    return left @ right


def _gain(z: Tensor, judges: Tensor, training: FlowTraining) -> tuple[Tensor, Tensor]:
    """Nats per judge [d] that bending each direction of z [N, d] is worth, fitted to the others, and their error."""
    splines = _splines(z[~judges], training.bandwidth, torch.ones(z.shape[1], dtype=torch.bool))
    bent, slopes = bend(z[judges], *splines)
    worth = 0.5 * (z[judges].square() - bent.square()) + slopes.log()
    return worth.mean(0), worth.std(0) / len(worth) ** 0.5


def _splines(z: Tensor, bandwidth: float, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots x, y and slopes [d, M] that make each kept direction of z [N, d] normal; straight lines for the others.

    y(x) = Phi^-1(F(x)) with F the distribution of a Gaussian kernel density.
    """
    count = len(z)
    spread = z.std(0).clamp_min(1e-6)
    width = bandwidth * 1.06 * spread * count**-0.2  # Silverman 1986, eq. 3.28
    low, high = z.amin(0) - 2 * width, z.amax(0) + 2 * width
    share = torch.linspace(0, 1, KNOTS, dtype=z.dtype)
    # Half of the knots where people are, half evenly, so that gaps between groups have theirs too.
    even = low + (high - low) * share[:, None]
    dense = torch.quantile(z, share.clamp(0.002, 0.998), dim=0)
    x = (0.5 * (even + dense)).T.contiguous()  # [d, M]
    x = _increasing(x, 1e-3 * spread)
    distance = (x[:, :, None] - z.T[:, None, :]) / width[:, None, None]  # [d, M, N]
    share_below = torch.special.ndtr(distance).mean(2).clamp(1e-6, 1 - 1e-6)
    density = torch.exp(-0.5 * distance.square()).mean(2) / (
        width[:, None] * math.sqrt(2 * math.pi)
    )
    y = _increasing(torch.special.ndtri(share_below), torch.full_like(spread, 1e-4))
    normal = torch.exp(-0.5 * y.square()) / math.sqrt(2 * math.pi)
    slope = (density / normal).clamp(0.02, 50.0)
    line = torch.linspace(-3, 3, KNOTS, dtype=z.dtype).expand_as(x)
    chosen = kept[:, None]
    return (
        torch.where(chosen, x, line),
        torch.where(chosen, y, line),
        torch.where(chosen, slope, torch.ones_like(slope)),
    )


def _increasing(knots: Tensor, step: Tensor) -> Tensor:
    """knots [d, M] with gaps of at least ``step`` [d]."""
    gaps = knots.diff(dim=1).maximum(step[:, None])
    return torch.cat([knots[:, :1], knots[:, :1] + gaps.cumsum(1)], dim=1)
