"""Identities that the official code of weights2weights saved, into a space."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..basis import AffineBasis
from ..errors import FormatError, SpaceMismatch
from ..files.torchfile import load_tensor
from ..identity import Identity
from ..space import Space
from .w2w import whitened

MOST_COMPONENTS = 10_000  # that official files have


def read_coefficients(
    path: str | os.PathLike[str], space: Space, *, residual: bool = False
) -> tuple[Identity, float]:
    """Coefficients [B, K'] or [K'] of a `w2wmodel.pt` as an identity of a space, and the share of their energy that it
    lacks.

    What lies beyond the space's K components is that share. With `residual` the identity also keeps what its latents
    can't express of the others. Raw weights [B, P] are told by their number and taken too. Raises SpaceMismatch for a
    space without components and FormatError for a file that holds no such tensor.
    """
    identity, facts = read_numbers(path, space, residual=residual)
    return identity, float(facts.get("energy_beyond_the_space", 0.0))


@torch.no_grad()
def read_numbers(
    path: str | os.PathLike[str], space: Space, *, residual: bool = False
) -> tuple[Identity, dict[str, Any]]:
    """The same, with what the numbers were: official coefficients, or the raw weights of LoRAs in the gauge of the
    official data set.

    Raises FormatError for numbers of neither kind, SpaceMismatch for coefficients and a space without components.
    """
    if isinstance(space.basis, AffineBasis):
        raise SpaceMismatch(
            f"'{space.name}' has no components; coefficients need a linear space of the official files, or one "
            "trained on its basis."
        )
    numbers = load_tensor(Path(path), ndim=2, or_flat=True)
    facts: dict[str, Any]
    if numbers.shape[1] == space.layout.size != space.basis.n_components:
        c, facts = space.basis.project(numbers), {"numbers": "raw weights"}
    elif numbers.shape[1] > MOST_COMPONENTS:
        raise FormatError(
            f"{path} holds {numbers.shape[1]:,} numbers per identity: neither the {space.layout.size:,} "
            f"weights of the layout '{space.layout.name}' nor coefficients, of which the official files "
            f"have up to {MOST_COMPONENTS:,}."
        )
    else:
        c, dropped = whitened(numbers, space.basis.singular_values)
        facts = {"numbers": "coefficients", "energy_beyond_the_space": round(dropped, 6)}
    z = space.latent_of(space.codec.encode(c).mean)
    rest = space.residual(c, z) if residual else None
    return Identity(z, space.fingerprint, rest, {"made_by": "import-identity"}), facts
