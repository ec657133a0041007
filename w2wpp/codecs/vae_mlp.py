"""The plain VAE in the shape of the original w2w++, here on whitened coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import LOGVAR_MAX, LOGVAR_MIN, Codec, Posterior


class MLPVAE(Codec):
    """K -> hidden -> d and back, LeakyReLU 0.01 between linear layers.

    Parameter names are those of the original checkpoints. The gain g [K] (standard deviation of each
    coefficient relative to the first) undoes the whitening at the entrance: with nearly as many
    components as training rows, whitened rows are all orthogonal and tell nothing of each other.
    """

    name = "vae-mlp"

    gain: Tensor | None
    whitened: ClassVar[bool] = True

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        hidden: Sequence[int] = (512, 256),
    ) -> None:
        super().__init__(coefficient_size, latent_size)
        self.hidden = tuple(hidden)
        self.register_buffer("gain", torch.ones(coefficient_size) if self.whitened else None)
        widths = [coefficient_size, *self.hidden]
        back = self.hidden[::-1]

        def layer(size_in: int, size_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(size_in, size_out), nn.LeakyReLU(0.01))

        self.encoder = nn.Sequential(*(layer(i, o) for i, o in pairwise(widths)))
        self.fc_mu = nn.Linear(widths[-1], latent_size)
        self.fc_var = nn.Linear(widths[-1], latent_size)
        self.decoder_input = nn.Linear(latent_size, widths[-1])
        self.decoder = nn.Sequential(*(layer(i, o) for i, o in pairwise(back)))
        self.final_layer = nn.Sequential(
            nn.Linear(back[-1] if back else coefficient_size, coefficient_size),
            *self._head(),
        )

    def options(self) -> dict[str, Any]:
        return {"hidden": list(self.hidden)}

    @torch.no_grad()
    def adapt(self, singular_values: Tensor, weight: Tensor, beta: float) -> None:
        """Set the gain to the scales [K] relative to the largest."""
        if self.gain is not None:
            self.gain.copy_(singular_values / singular_values.max())

    def _head(self) -> Sequence[nn.Module]:
        return ()

    def _encode(self, c: Tensor) -> Posterior:
        h = self.encoder(c if self.gain is None else c * self.gain)
        return Posterior(self.fc_mu(h), self.fc_var(h).clamp(LOGVAR_MIN, LOGVAR_MAX))

    def _decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder(self.decoder_input(z)))
