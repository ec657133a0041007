"""The avatars' autoencoder: pictures [B, 3, 8h, 8w] to latents [B, 4, h, w] and back (Kingma & Welling 2014).

As in Stable Diffusion an eighth per side and four channels, so a picture of 128x128 becomes 4x16x16 numbers. Pixels are
folded 4x4 into channels first: everything runs at a quarter of the resolution or below, which keeps it small and quick.
Latents are centred and scaled per channel, so that over avatars they have mean zero and unit std.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...files.container import open_container, write_container

FORMAT = "w2wpp.avatar_vae"
LATENT_CHANNELS = 4
FACTOR = 8  # pixels per latent, per side
FOLD = 4  # pixels folded into channels, per side


class AvatarVae(nn.Module):
    """Encoder to a diagonal Gaussian, decoder back; fully convolutional."""

    shift: Tensor
    scale: Tensor

    def __init__(self, wide: int = 64, deep: int = 128) -> None:
        super().__init__()
        self.wide, self.deep = wide, deep
        folded = 3 * FOLD**2
        self.encoder = nn.Sequential(
            nn.Conv2d(folded, wide, 3, padding=1),
            _Residual(wide),
            _Residual(wide),
            nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            _Residual(wide),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, 2 * LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, deep, 3, padding=1),
            _Residual(deep),
            _Residual(deep),
            nn.Conv2d(deep, 4 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(wide),
            _Residual(wide),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, folded, 3, padding=1),
            nn.PixelShuffle(FOLD),
        )
        self.register_buffer("shift", torch.zeros(LATENT_CHANNELS))  # mean of raw latents
        self.register_buffer("scale", torch.ones(LATENT_CHANNELS))  # their standard deviation

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 8h, 8w] in [-1, 1] -> mean and log variance of raw latents, [B, 4, h, w] each."""
        mean, log_variance = self.encoder(F.pixel_unshuffle(pictures, FOLD)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 4)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Raw latents [B, 4, h, w] -> pictures [B, 3, 8h, 8w], not clamped."""
        return self.decoder(raw)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 8h, 8w] in [-1, 1] -> latents [B, 4, h, w] of unit std: the posterior's mean."""
        mean, _ = self.posterior(pictures)
        return (mean - self.shift[:, None, None]) / self.scale[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] of unit std -> pictures [B, 3, 8h, 8w] in [-1, 1]."""
        raw = latents * self.scale[:, None, None] + self.shift[:, None, None]
        return self.decode_raw(raw).clamp(-1, 1)


class _Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm_first = nn.GroupNorm(8, width)
        self.norm_second = nn.GroupNorm(8, width)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(F.silu(self.norm_first(hidden)))
        return hidden + self.second(F.silu(self.norm_second(inner)))


def save_vae(vae: AvatarVae, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write the autoencoder in half precision."""
    tensors = {name: value.detach().half() for name, value in vae.state_dict().items()}
    config = {"wide": vae.wide, "deep": vae.deep, "provenance": dict(provenance or {})}
    write_container(path, tensors, format=FORMAT, config=config)


def load_vae(path: str | Path) -> AvatarVae:
    """Read an autoencoder written by ``save_vae``, in fp32, frozen and in evaluation mode."""
    file = open_container(path, FORMAT)
    vae = AvatarVae(int(file.config["wide"]), int(file.config["deep"]))
    for name, value in vae.state_dict().items():
        file.require(name, tuple(value.shape), torch.float16)
        value.copy_(file.read(name))
    return vae.requires_grad_(False).eval()
