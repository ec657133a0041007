"""The amortised start: a small network from a picture to a latent, trained with a space and stored in its file.

It costs one pass of its own and none of the UNet. An answer that is only a regression is shorter than real latents;
calibration on paintings (`training.fit_start.LabelMap`) makes up for that, or by hand `scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, ShapeError


class StartNetwork(nn.Module):
    """Pictures [n, 3, H, W] in [-1, 1] -> latents [n, d]."""

    scale: Tensor  # []
    spread: (
        Tensor  # [r, d] how latents move when a person differs by one std in what the network reads
    )

    def __init__(
        self,
        latent_size: int,
        *,
        rank: int = 0,
        size: int = 32,
        width: int = 32,
        features: int = 128,
    ) -> None:
        super().__init__()
        if size % 8 or width % 8 or min(size, width, features, latent_size) < 1:
            raise ConfigError(
                f"A start network's size and width are multiples of 8. Got {size=}, {width=}."
            )
        self.latent_size, self.size, self.width, self.features = latent_size, size, width, features
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        blocks = [_Block(width, 2 * width), _Block(2 * width, 3 * width)]
        self.blocks = nn.ModuleList(blocks)
        self.neck = nn.Linear(3 * width * (size // 8) ** 2, features)
        self.head = nn.Linear(features, latent_size)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("spread", torch.zeros(rank, latent_size))

    @property
    def config(self) -> dict[str, int]:
        """What `build_start` needs to make this architecture again."""
        sizes = {"latent_size": self.latent_size, "rank": len(self.spread), "size": self.size}
        return {**sizes, "width": self.width, "features": self.features}

    def describe(self, pictures: Tensor) -> Tensor:
        """Pictures of any size -> features [n, F]."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ShapeError(
                f"A start network reads pictures [n, 3, H, W]. Got {list(pictures.shape)}."
            )
        if pictures.shape[-2:] != (self.size, self.size):
            pictures = F.interpolate(
                pictures, (self.size, self.size), mode="bilinear", antialias=True
            )
        hidden = self.stem(F.pixel_unshuffle(pictures, 2))
        for block in self.blocks:
            hidden = block(hidden)
        return F.silu(self.neck(hidden.flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of any size -> latents [n, d]."""
        return self.head(self.describe(pictures)) * self.scale


class _Block(nn.Module):
    """Two convolutions around a shortcut, then half the resolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1)
        self.norm_first = nn.GroupNorm(8, width_in)
        self.norm_second = nn.GroupNorm(8, width_out)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(F.silu(self.norm_first(hidden)))
        inner = self.second(F.silu(self.norm_second(inner)))
        return F.avg_pool2d(self.shortcut(hidden) + inner, 2)


def build_start(config: Mapping[str, Any]) -> StartNetwork:
    """The network that a `config` describes."""
    sizes = ("latent_size", "rank", "size", "width", "features")
    return StartNetwork(**{key: int(config[key]) for key in sizes})
