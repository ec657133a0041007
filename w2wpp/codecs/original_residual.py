"""The residual VAE of the original w2w++: raw vectors scaled to [-1, 1], blocks with layer norms and shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .base import LOGVAR_MAX, LOGVAR_MIN, Codec, Posterior


class OriginalResidual(Codec):
    """P -> h, residual blocks at h, heads to d, and back. Parameter names are those of its published checkpoints.

    `hidden` names the width h once per block and side; `inner` the widths between the two linear
    layers of first_layer, fc_mu, fc_var and final_layer and inside of the blocks, all h by default.
    Use with the affine basis that takes the published range of weights to [-1, 1].
    """

    name, stored_name = "original-residual", "seed-residual"

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        hidden: Sequence[int] = (1024, 1024, 1024, 1024),
        inner: Sequence[int] = (),
    ) -> None:
        super().__init__(coefficient_size, latent_size)
        if not hidden or len(set(hidden)) != 1 or len(inner) not in (0, 5):
            raise ConfigError(
                "original-residual needs one width for all its blocks and five inner widths or none. "
                f"Got {hidden=} and {inner=}."
            )
        h = hidden[0]
        self.hidden, self.inner = tuple(hidden), tuple(inner) or (h,) * 5
        first, mu, var, final, block = self.inner
        p, d = coefficient_size, latent_size

        def pair(size_in: int, middle: int, size_out: int) -> nn.Sequential:
            linear = nn.Linear
            return nn.Sequential(linear(size_in, middle), nn.ReLU(), linear(middle, size_out))

        self.first_layer = pair(p, first, h)
        self.encoder = nn.Sequential(*(_Block(h, block) for _ in hidden))
        self.fc_mu = pair(h, mu, d)
        self.fc_var = pair(h, var, d)
        self.decoder_input = nn.Linear(d, h)
        self.decoder = nn.Sequential(*(_Block(h, block) for _ in hidden))
        self.final_layer = pair(h, final, p)

    def options(self) -> dict[str, Any]:
        return {"hidden": list(self.hidden), "inner": list(self.inner)}

    def _encode(self, c: Tensor) -> Posterior:
        h = self.encoder(self.first_layer(c))
        return Posterior(self.fc_mu(h), self.fc_var(h).clamp(LOGVAR_MIN, LOGVAR_MAX))

    def _decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder(self.decoder_input(z)))


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(width, inner),
            nn.ReLU(),
            nn.LayerNorm(inner),
            nn.Linear(inner, width),
            nn.LayerNorm(width),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.block(h)
