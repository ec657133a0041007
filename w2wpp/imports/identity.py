"""Identities that the official code of weights2weights saved, into a space."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..basis import AffineBasis
from ..errors import SpaceMismatch
from ..files.torchfile import load_tensor
from ..identity import Identity
from ..space import Space
from .w2w import whitened


@torch.no_grad()
def read_coefficients(
    path: str | os.PathLike[str], space: Space, *, residual: bool = False
) -> tuple[Identity, float]:
    """Coefficients [B, K'] of a `w2wmodel.pt` as an identity of a space, and the share of their energy that it lacks.

    What lies beyond the space's K components is that share. With `residual` the identity also keeps what its latents
    can't express of the others. Raises SpaceMismatch for a space without components and FormatError for a file that
    holds no such tensor.
    """
    if isinstance(space.basis, AffineBasis):
        raise SpaceMismatch(
            f"'{space.name}' has no components; coefficients need a space made by 'w2wpp import-w2w' "
            "or trained on its basis."
        )
    c, dropped = whitened(load_tensor(path, ndim=2), space.basis.singular_values)
    z = space.latent_of(space.codec.encode(c).mean)
    rest = space.residual(c, z) if residual else None
    how = {"made_by": "import-identity", "files": [Path(path).name]}
    return Identity(z, space.fingerprint, rest, how), dropped
