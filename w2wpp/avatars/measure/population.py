"""Sampled people as a crowd: like themselves, spread as real ones are, decided, and nobody's copy.

Every figure comes once for the reader that the project trains with, and once, under a key that ends in
``_independent``, for the one that only ever scores, where the studio has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...metrics import consistency, estimate, likeness_between, nearest_cosine, ratio_estimate
from ...populations import (
    Distance,
    bimodality,
    difference_estimate,
    energy_distance,
    floor_of,
    modes_of,
    neighbourhoods,
    undecided,
)
from ..world.studio import Shots

DISCRETE = ("beard", "glasses", "fringe")  # traits that a face has or has not
Row = dict[str, Any]


def readings(shots: Shots) -> dict[str, Shots]:
    """What each reader says, by what its keys end in."""
    independent: Shots | None = getattr(shots, "independent", None)
    return {"": shots} if independent is None else {"": shots, "_independent": independent}


def crowd_row(
    sampled: Shots, real: Shots, known: Tensor, strangers: Tensor, traits: Sequence[str]
) -> Row:
    """Sampled people beside real ones that were photographed as often.

    known [K, D] and strangers [S, D] are true identities of training and of held-out people: whether sampled people
    come nearer to the former than strangers do. ``traits`` names the D numbers.
    """
    row: Row = {}
    truth = readings(real)
    for suffix, some in readings(sampled).items():
        faces, others = some.traits.mean(1), truth[suffix].traits.mean(1)
        alike = consistency(some.embeddings)
        nearest = nearest_cosine(some.faces, known)
        figures = {
            "consistency": estimate(alike).to_json(),
            "consistency_share": ratio_estimate(
                alike, consistency(truth[suffix].embeddings), paired=False
            ).to_json(),
            "diversity": estimate(1 - likeness_between(some.embeddings)).to_json(),
            "energy": energy_of(some, truth[suffix]).estimate().to_json(),
            **neighbourhoods(others, faces),
            "nearest_training": estimate(nearest).to_json(),
            "nearest_above_strangers": difference_estimate(
                nearest, nearest_cosine(strangers, known)
            ).to_json(),
            "traits": _decided(faces, others, traits),
        }
        row |= {f"{name}{suffix}": value for name, value in figures.items()}
    return row


def reference_row(real: Shots, known: Tensor, strangers: Tensor, traits: Sequence[str]) -> Row:
    """What real people reach among themselves: the floor of distances, and halves against halves."""
    row: Row = {}
    for suffix, some in readings(real).items():
        faces = some.traits.mean(1)
        figures = {
            "consistency": estimate(consistency(some.embeddings)).to_json(),
            "diversity": estimate(1 - likeness_between(some.embeddings)).to_json(),
            "energy": floor_of(faces).to_json(),
            **neighbourhoods(faces),
            "nearest_training": estimate(nearest_cosine(some.faces, known)).to_json(),
            "nearest_training_true": estimate(nearest_cosine(strangers, known)).to_json(),
            "traits": _decided(faces, faces, traits),
        }
        row |= {f"{name}{suffix}": value for name, value in figures.items()}
    return row


def energy_of(sampled: Shots, real: Shots) -> Distance:
    """Energy distance of the traits that one reader sees, each person's mean over their pictures."""
    return energy_distance(sampled.traits.mean(1), real.traits.mean(1))


def unit(identity: Tensor) -> Tensor:
    """True identities [N, D] as unit vectors."""
    return F.normalize(identity, dim=-1)


def _decided(faces: Tensor, real: Tensor, traits: Sequence[str]) -> dict[str, Row]:
    """Of traits that come in kinds: how bimodal they are, and how many people lie between the real ones' two kinds."""
    found = {}
    for name in (t for t in DISCRETE if t in traits):
        i = list(traits).index(name)
        half_drawn = undecided(faces[:, i], modes_of(real[:, i]))
        found[name] = {
            "bimodality": bimodality(faces[:, i]),
            "undecided": estimate(half_drawn).to_json(),
        }
    return found
