"""A transformer whose tokens are the modules of a LoRA: attention between layers of the base model, beside PCA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import LOGVAR_MAX, LOGVAR_MIN, Codec, Posterior

HEADS = 4
SEEN = 4096  # rows that the start is taken from, at most
RANK = 1e-8  # share of the largest variance below which a direction is rounding


class Tokens(Codec):
    """Vectors [B, P] in M segments, one a module -> M tokens -> attention -> latents, and the same way back.

    encode: mean = E x + f(x)     decode: x = D z + h(z)     x = (c - centre) / unit
    E and D are learned too and begin as PCA of the training rows (`learn_from`); the last layers of f and h begin at
    zero. So an untrained codec is PCA of raw numbers, and what the transformers add has to be worth it. `hidden` has
    the width of a token once per layer, on each side. Use with an affine basis.
    """

    name = "tokens"

    centre: Tensor
    unit: Tensor

    def __init__(
        self,
        coefficient_size: int,
        latent_size: int,
        *,
        segments: Sequence[int],
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(coefficient_size, latent_size)
        sizes = [n for n in segments if type(n) is int and n > 0]
        if sum(sizes) != coefficient_size or len(sizes) != len(segments):
            raise ConfigError(
                "The tokens codec reads raw vectors, whose segments (one a module) add up to K. Got "
                f"{len(segments)} segments for K = {coefficient_size}; train it on a data set, not on coefficients."
            )
        if not hidden or len(set(hidden)) != 1 or hidden[0] % HEADS:
            raise ConfigError(
                f"'hidden' of a tokens codec is one width, a multiple of {HEADS}, once per layer. Got {list(hidden)}."
            )
        self.segments, self.hidden = tuple(sizes), tuple(hidden)
        width, count, d = hidden[0], len(sizes), latent_size
        self.register_buffer("centre", torch.zeros(coefficient_size))
        self.register_buffer("unit", torch.ones(()))
        self.encoder_linear = nn.Linear(coefficient_size, d, bias=False)
        self.decoder_linear = nn.Linear(d, coefficient_size, bias=False)
        self.read = nn.ModuleList(nn.Linear(n, width) for n in sizes)
        self.read_place = nn.Parameter(0.02 * torch.randn(count, width))
        self.encoder = _layers(width, len(hidden))
        self.fc_mu = nn.Linear(count * width, d)
        self.fc_var = nn.Linear(count * width, d)
        self.spread = nn.Linear(d, count * width)
        self.write_place = nn.Parameter(0.02 * torch.randn(count, width))
        self.decoder = _layers(width, len(hidden))
        self.write = nn.ModuleList(nn.Linear(width, n) for n in sizes)
        for layer in (self.fc_mu, self.fc_var, *self.write):
            for p in layer.parameters():
                nn.init.zeros_(p)

    def options(self) -> dict[str, Any]:
        return {"segments": list(self.segments), "hidden": list(self.hidden)}

    @torch.no_grad()
    def adapt(self, singular_values: Tensor, weight: Tensor, beta: float) -> None:
        """The posterior variance of a unit that explains its share, as in the skip VAE."""
        t = max(beta, 1e-6) / (2 * self.latent_size)
        self.fc_var.bias.fill_(float(torch.log(torch.tensor(t / (1 / self.latent_size + t)))))

    @torch.no_grad()
    def learn_from(self, c: Tensor) -> None:
        """Begin as PCA of rows c [n, K]; directions beyond their rank stay unused."""
        centre = c.mean(0)
        unit = (c - centre).square().mean().sqrt().clamp_min(1e-12)
        x = ((c - centre) / unit)[:SEEN].double()
        # By the Gram matrix of the rows: LoRAs have more numbers than there are rows.
        values, left = torch.linalg.eigh(x @ x.T)
        keep = values.flip(0)[: self.latent_size] > RANK * values[-1]
        s, u = values.flip(0)[: len(keep)][keep].sqrt(), left.flip(1)[:, : len(keep)][:, keep]
        v, s, rank = (x.T @ (u / s)).float(), (s / len(x) ** 0.5).float(), int(keep.sum())
        self.centre.copy_(centre)
        self.unit.copy_(unit)
        self.encoder_linear.weight.zero_()
        self.decoder_linear.weight.zero_()
        self.encoder_linear.weight[:rank] = v.T / s[:, None]
        self.decoder_linear.weight[:, :rank] = v * s

    def _encode(self, c: Tensor) -> Posterior:
        x = (c - self.centre) / self.unit
        parts = x.split(self.segments, dim=1)
        tokens = torch.stack([read(part) for read, part in zip(self.read, parts)], dim=1)
        h = self.encoder(tokens + self.read_place).flatten(1)  # [B, M width]
        mean = self.encoder_linear(x) + self.fc_mu(h)
        return Posterior(mean, self.fc_var(h).clamp(LOGVAR_MIN, LOGVAR_MAX))

    def _decode(self, z: Tensor) -> Tensor:
        tokens = self.spread(z).unflatten(1, (len(self.segments), -1)) + self.write_place
        h = self.decoder(tokens)  # [B, M, width]
        rest = torch.cat([write(h[:, i]) for i, write in enumerate(self.write)], dim=1)
        return (self.decoder_linear(z) + rest) * self.unit + self.centre


def _layers(width: int, count: int) -> nn.Module:
    """Pre-norm transformer layers (Vaswani et al. 2017; Xiong et al. 2020)."""
    made = [
        nn.TransformerEncoderLayer(
            width,
            HEADS,
            2 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        for _ in range(count)
    ]
    return nn.Sequential(*made)
