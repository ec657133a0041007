"""The linear codec: latents are whitened coefficients. With a PCA basis, weights2weights (w2w)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import LOGVAR_MIN, Codec, Posterior


class PCA(Codec):
    """The identity, d = K. Nothing is uncertain: the posterior has the least variance allowed."""

    name = "pca"

    def __init__(self, coefficient_size: int, latent_size: int) -> None:
        super().__init__(coefficient_size, latent_size)
        if latent_size != coefficient_size:
            raise ConfigError(
                "The pca codec keeps all coefficients; truncate the basis instead. Got "
                f"{coefficient_size=} and {latent_size=}."
            )

    def _encode(self, c: Tensor) -> Posterior:
        return Posterior(c, torch.full_like(c, LOGVAR_MIN))

    def _decode(self, z: Tensor) -> Tensor:
        return z
