"""The curved codec: PCA's own d latents, and a smooth map of them to all further coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import LOGVAR_MIN, Codec, Posterior

CENTRES = 1024


class Curved(Codec):
    """encode: z = c[:d]     decode: c = (z, A k(z)) with k_m(z) = exp(-|scale * z - centre_m|^2 / 2), m = 1 .. M.

    What PCA of size d cuts off is uncorrelated with z but not independent of it: whoever wears glasses has them in
    many coefficients. A [M, K - d] is fitted by ridge regression (`training.fit_curved`), so that training has one
    optimum; with A = 0 this is PCA of size d. Latents are PCA's, the same numbers for the same person. Far from all
    centres k vanishes and the codec is linear again. The centres are drawn at random and are nobody's latents. The gain
    g [K - d] (standard deviation of each coefficient relative to the first) keeps A of one size in half precision.
    """

    name = "curved"

    scale: Tensor
    centres: Tensor

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        hidden: tuple[int] | list[int] = (CENTRES,),
    ) -> None:
        super().__init__(coefficient_size, latent_size)
        if latent_size >= coefficient_size or len(hidden) != 1:
            raise ConfigError(
                "The curved codec needs d < K, or nothing is left to predict, and the number of its centres as its one "
                f"hidden width. Got {latent_size=}, {coefficient_size=} and {hidden=}."
            )
        (count,), rest = hidden, coefficient_size - latent_size
        self.register_buffer("scale", torch.ones(latent_size))
        self.register_buffer("centres", torch.zeros(count, latent_size))
        self.map = nn.Linear(count, rest, bias=False)
        nn.init.zeros_(self.map.weight)

    def options(self) -> dict[str, Any]:
        return {"hidden": [len(self.centres)]}

    def features(self, z: Tensor) -> Tensor:
        """k(z): latents [B, d] -> [B, M] in 0 .. 1."""
        return radial(z * self.scale, self.centres)

    def _encode(self, c: Tensor) -> Posterior:
        z = c[:, : self.latent_size]
        return Posterior(z, torch.full_like(z, LOGVAR_MIN))

    def _decode(self, z: Tensor) -> Tensor:
        return torch.cat([z, self.map(self.features(z))], dim=1)


def radial(x: Tensor, centres: Tensor) -> Tensor:
    """exp(-|x - centre|^2 / 2) of points [B, d] about centres [M, d]: [B, M]."""
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * x @ centres.T
    return torch.exp(-0.5 * squares.clamp_min(0))
