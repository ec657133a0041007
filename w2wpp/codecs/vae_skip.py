"""The VAE that starts as PCA: d coefficients, plus a linear map, plus a residual MLP, each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import LOGVAR_MAX, LOGVAR_MIN, Codec, Dropout, Posterior


class SkipVAE(Codec):
    """With zero weights in the learned parts, decode(encode(c).mean) is c cut to its first d
    coefficients: PCA of size d.

    encode: mean = c[:d] + E c + f(g c), logvar = L f'(g c)     decode: c = (z, 0) + D z + g h(z)
    E, D and the last layers of f and h start at zero. The gain g [K] (standard deviation of each
    coefficient relative to the first) keeps the many coefficients of little weight from feeding
    noise through the networks.
    """

    name = "vae-skip"

    gain: Tensor

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        hidden: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(coefficient_size, latent_size)
        if latent_size > coefficient_size:
            raise ConfigError(f"vae-skip needs d <= K. Got {latent_size=} and {coefficient_size=}.")
        self.hidden, self.dropout = tuple(hidden), float(dropout)
        k, d = coefficient_size, latent_size
        self.register_buffer("gain", torch.ones(k))
        self.encoder_linear = nn.Linear(k, d, bias=False)
        self.encoder = _mlp(k, self.hidden, self.dropout)
        self.fc_mu = nn.Linear(self._width(k), d)
        self.fc_var = nn.Linear(self._width(k), d)
        self.decoder_linear = nn.Linear(d, k)
        self.decoder = _mlp(d, self.hidden, self.dropout)
        self.final_layer = nn.Linear(self._width(d), k, bias=False)
        self._start_at_pca()

    def options(self) -> dict[str, Any]:
        return {"hidden": list(self.hidden), "dropout": self.dropout}

    @torch.no_grad()
    def adapt(self, singular_values: Tensor, weight: Tensor, beta: float) -> None:
        """Gains, and the posterior variance that is best while the codec is linear.

        Unit j costs weight_j v + beta / (2 d) (v - log v), which is least at v = t / (weight_j +
        t), t = beta / (2 d).
        """
        self.gain.copy_(singular_values / singular_values.max())
        t = max(beta, 1e-6) / (2 * self.latent_size)
        self.fc_var.bias.copy_(torch.log(t / (weight[: self.latent_size] + t)))

    def _width(self, size_in: int) -> int:
        return self.hidden[-1] if self.hidden else size_in

    def _start_at_pca(self) -> None:
        for layer in (
            self.encoder_linear,
            self.fc_mu,
            self.fc_var,
            self.decoder_linear,
            self.final_layer,
        ):
            for p in layer.parameters():
                nn.init.zeros_(p)

    def _encode(self, c: Tensor) -> Posterior:
        h = self.encoder(c * self.gain)
        mean = c[:, : self.latent_size] + self.encoder_linear(c * self.gain) + self.fc_mu(h)
        return Posterior(mean, self.fc_var(h).clamp(LOGVAR_MIN, LOGVAR_MAX))

    def _decode(self, z: Tensor) -> Tensor:
        padded = nn.functional.pad(z, (0, self.coefficient_size - self.latent_size))
        return padded + (self.decoder_linear(z) + self.final_layer(self.decoder(z))) * self.gain


def _mlp(size_in: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in zip([size_in, *hidden], hidden):
        layers += [nn.Linear(i, o), nn.SiLU(), Dropout(dropout)]
    return nn.Sequential(*layers)
