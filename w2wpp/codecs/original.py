"""The vanilla VAE of the original w2w++: raw vectors times ten in, tanh out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .vae_mlp import MLPVAE


class Original(MLPVAE):
    """P -> 2048 -> 1024 -> d and back, then tanh.

    Use with `AffineBasis(P, scale=10)`: a decoded vector is tanh(...) / 10.
    """

    name, stored_name = "original", "seed"
    whitened = False  # raw vectors; and the published checkpoints hold no gain

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        hidden: Sequence[int] = (2048, 1024),
    ) -> None:
        super().__init__(coefficient_size, latent_size, hidden=hidden)

    def _head(self) -> Sequence[nn.Module]:
        return (nn.Tanh(),)
