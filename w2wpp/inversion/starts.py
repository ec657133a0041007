"""Where an inversion can start when there is no better idea: the best of several candidates."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..identity import Identity, require_same_space
from .objective import Objective


def best_of(objective: Objective, candidates: Identity) -> Identity:
    """For each of the objective's B people the candidate that explains their pictures best: an identity of B.

    Candidates are C samples of the space (`space.sample`), encoded training identities, or anything else. All meet the
    same noise, that of the first step, and count as evaluations: C for each draw and person.
    """
    space, people = objective.space, objective.people
    require_same_space(candidates.space_fingerprint, space.fingerprint, space.name)
    if not len(candidates):
        raise ConfigError("There is no candidate to start from.")
    count, device = len(candidates), space.prior_mean.device
    z = candidates.z.to(device)
    residual = None if candidates.residual is None else candidates.residual.to(device)
    with torch.no_grad():
        losses = objective.loss(
            z.repeat(people, 1),
            None if residual is None else residual.repeat(people, 1),
            objective.draw(0),
        )
    best = losses.unflatten(0, (people, count)).argmin(1).cpu()  # [B]
    how = {"made_by": "best_of", "candidates": count, "of": dict(candidates.provenance)}
    rest = None if candidates.residual is None else candidates.residual[best]
    return Identity(candidates.z[best], candidates.space_fingerprint, rest, how)
