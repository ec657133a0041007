"""Edits: identities moved along a space's attribute directions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .commands import command
from .errors import ConfigError
from .identity import Identity, require_same_space
from .space import Space


def edit(identity: Identity, space: Space, strengths: Mapping[str, float]) -> Identity:
    """The identity with attributes changed, {name: standard deviations of the attribute}.

    Every latent of the batch z [B, d] moves by sum_a strength_a * direction_a; zero leaves it
    where it is. A residual stays as it is.

    Raises SpaceMismatch for an identity of another space, ConfigError for an unknown attribute or a strength that is
    not finite.
    """
    require_same_space(identity.space_fingerprint, space.fingerprint, space.name)
    unknown = sorted(strengths.keys() - space.directions.keys())
    if unknown:
        raise ConfigError(
            f"The space '{space.name}' has no direction {', '.join(map(repr, unknown))}; "
            f"{known_directions(space)}."
        )
    wrong = [name for name, value in strengths.items() if not math.isfinite(value)]
    if wrong:
        raise ConfigError(
            f"The strength of '{wrong[0]}' must be finite. Got {strengths[wrong[0]]}."
        )
    z = identity.z
    for name, value in strengths.items():
        z = z + value * space.directions[name].to(z)
    how = {
        "made_by": "edit",
        "strengths": {name: float(value) for name, value in strengths.items()},
        "parents": [dict(identity.provenance)],
    }
    return Identity(z, identity.space_fingerprint, identity.residual, how)


def known_directions(space: Space) -> str:
    """What can be edited in a space, as the end of a sentence."""
    if not space.directions:
        return f"it has none at all: add some with '{command('directions')}'"
    return f"it has {', '.join(sorted(space.directions))}"


def readings(identity: Identity, space: Space) -> dict[str, float]:
    """Where the first person stands on every attribute, in its standard deviations among people: mean 0, 95 % of
    people within 2.

    What reads an attribute a is B_a of B = D (D^T D)^-1, for the directions D [d, A], which raise one reading by one
    and no other (see training.directions).
    """
    require_same_space(identity.space_fingerprint, space.fingerprint, space.name)
    if not space.directions:
        return {}
    steps = torch.stack([t.double() for t in space.directions.values()], dim=1)
    found = torch.linalg.pinv(steps) @ identity.z[0].double()
    return dict(zip(space.directions, found.tolist()))
