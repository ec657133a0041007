"""Several people as one, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError
from .identity import Identity, concat

MOST_ROUNDS = 100
CLOSE_ENOUGH = 1e-12


def mix(
    identities: Sequence[Identity], weights: Sequence[float], *, mode: str = "slerp"
) -> Identity:
    """One person from several, by weights that count relative to one another.

    An identity that holds several people shares its weight among them. slerp takes the weighted mean on the sphere
    of directions (Buss & Fillmore 2001) at the weighted mean of the lengths, so a mix is as far from the average
    person as those that it is made of, and two of the same length are mixed as `interpolate` does; lerp takes the
    weighted mean itself, which comes out more average the more people there are. A residual is always averaged.

    Raises ConfigError for an unknown mode or weights that are negative or all zero, ShapeError for too few or many,
    SpaceMismatch for people of several spaces.
    """
    if mode not in ("slerp", "lerp"):
        raise ConfigError(f"A mix goes by 'slerp' or 'lerp'. Got {mode!r}.")
    if len(identities) != len(weights):
        raise ShapeError(
            f"A mix takes a weight for each identity. Got {len(weights)} for {len(identities)}."
        )
    wrong = [w for w in weights if not (math.isfinite(w) and w >= 0)]
    if wrong:
        raise ConfigError(f"The weights of a mix are zero or positive. Got {wrong[0]}.")
    if not sum(weights) > 0:
        raise ConfigError("All weights of the mix are zero. Give at least one person a weight.")
    parts = [(i, w) for i, w in zip(identities, weights) if w > 0]
    everyone = concat([i for i, _ in parts])
    if len(everyone) == 1:
        return parts[0][0]
    shares = torch.cat([torch.full((len(i),), w / len(i)) for i, w in parts]).double()
    shares /= shares.sum()
    z = everyone.z.double()
    mean = _sphere_mean(z, shares) if mode == "slerp" else shares @ z
    residual = everyone.residual
    if residual is not None:
        residual = (shares @ residual.double())[None].float()
    how = {
        "made_by": "mix",
        "mode": mode,
        "weights": [float(w) for _, w in parts],
        "parents": [dict(i.provenance) for i, _ in parts],
    }
    return Identity(mean[None].float(), everyone.space_fingerprint, residual, how)


def _sphere_mean(z: Tensor, shares: Tensor) -> Tensor:
    """z [n, d], shares [n] that sum to one -> [d]."""
    lengths = z.norm(dim=1)
    line = shares @ z
    there = lengths > 0  # the average person has no direction
    if not bool(there.any()):
        return line
    units, weights = z[there] / lengths[there, None], shares[there] / shares[there].sum()
    mean = weights @ units
    if float(mean.norm()) < 1e-6:  # opposites: the sphere has no mean, the line has
        return line
    mean = mean / mean.norm()
    for _ in range(MOST_ROUNDS):
        step = weights @ _log(mean, units)
        mean = _exp(mean, step)
        if float(step.norm()) < CLOSE_ENOUGH:
            break
    return mean * (shares @ lengths)


def _log(at: Tensor, units: Tensor) -> Tensor:
    """The tangent vectors [n, d] at a point of the sphere [d] that lead to others [n, d]."""
    cosine = (units @ at).clamp(-1.0, 1.0)
    across = units - cosine[:, None] * at
    sine = across.norm(dim=1)
    angle = torch.atan2(sine, cosine)
    return across * torch.where(sine > 1e-12, angle / sine.clamp_min(1e-12), 1.0)[:, None]


def _exp(at: Tensor, step: Tensor) -> Tensor:
    """Where a tangent vector leads on the sphere."""
    length = step.norm()
    moved = torch.cos(length) * at + torch.sinc(length / math.pi) * step
    return moved / moved.norm()
