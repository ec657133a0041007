"""Mixtures of a collection's own LoRAs: weights that are not negative and sum to one stay inside of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .delta_basis import DeltaBasis
from .errors import ConfigError
from .identity import Identity
from .space import Space

DRAWN = 3  # members in a mixture that is drawn: of many, a mean would come near the mean of all


def members(space: Space) -> Identity:
    """A collection's own LoRAs as identities, in the order in which they came."""
    z = space.latent_of(space.codec.encode(_basis(space).member_coefficients()).mean)
    how = {"made_by": "collection", "space": space.name}
    return Identity(z, space.fingerprint, None, how)


def mix(space: Space, weights: Mapping[int, float] | Sequence[float]) -> Identity:
    """The mixture of members with these weights, given for all or by position; they are scaled to the sum one.

    Raises ConfigError for weights that are negative or all zero, and for a space that is no collection.
    """
    basis = _basis(space)
    given = dict(weights) if isinstance(weights, Mapping) else dict(enumerate(weights))
    unknown = [i for i in given if not 0 <= i < basis.count]
    if unknown or not all(math.isfinite(w) and w >= 0 for w in given.values()):
        raise ConfigError(
            f"Weights of a mixture are finite and not negative, for members 0 to {basis.count - 1}. Got {given}."
        )
    shares = torch.zeros(1, basis.count, dtype=torch.float64)
    for i, weight in given.items():
        shares[0, i] = weight
    if not float(shares.sum()) > 0:
        raise ConfigError("A mixture needs a weight above zero.")
    return _identity(space, shares / shares.sum(), {"made_by": "mix"})


def sample_mixtures(
    space: Space, n: int, *, generator: torch.Generator, truncation: float = 1.0
) -> Identity:
    """n mixtures of a few members each, drawn at random; `truncation` moves them towards the mean of all.

    Which members and how much of each follows the generator's integers, so that one seed gives one
    set of mixtures everywhere.

    Raises ConfigError for n below 1, a truncation above 1 or a space that is no collection.
    """
    basis = _basis(space)
    if n < 1:
        raise ConfigError(f"Sampling needs at least one identity. Got {n}.")
    if not 0.0 <= truncation <= 1.0:
        raise ConfigError(
            f"Mixtures stay within the collection up to a truncation of 1. Got {truncation}."
        )
    shares = torch.zeros(n, basis.count, dtype=torch.float64)
    count, steps = min(DRAWN, basis.count), 1 << 52
    for row in shares:
        order = torch.randint(steps, (basis.count,), generator=generator).argsort(stable=True)
        # Uniform over all weights with the sum one: the gaps between sorted uniform numbers.
        cuts = torch.randint(steps, (count - 1,), generator=generator).double().div(steps)
        edges = torch.cat([torch.zeros(1), cuts.sort().values, torch.ones(1)])
        row[order[:count]] = edges.diff()
    shares = basis.weights.cpu() + truncation * (shares - basis.weights.cpu())
    seed = generator.initial_seed()
    how = {
        "made_by": "sample mixtures",
        "seed": seed,
        "truncation": truncation,
        "space": space.name,
    }
    return _identity(space, shares, how)


def _identity(space: Space, shares: Tensor, how: dict) -> Identity:
    c = _basis(space).mixture(shares)
    z = space.latent_of(space.codec.encode(c).mean)
    weights = {"weights": [[round(w, 6) for w in row] for row in shares.tolist()]}
    return Identity(z, space.fingerprint, None, {**how, **weights})


def _basis(space: Space) -> DeltaBasis:
    if not isinstance(space.basis, DeltaBasis):
        raise ConfigError(
            f"The space '{space.name}' does not hold the LoRAs that it was made of, so they can't be mixed. "
            "Sample it instead, or interpolate between two identities."
        )
    return space.basis
