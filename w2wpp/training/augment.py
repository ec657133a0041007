"""What photographs suffer, done to pictures while a network learns to read them.

Everything is drawn from a generator on the CPU, picture by picture, so that a run repeats to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..placement import crop

# Quantisation of luminance and of colour at quality 50 (Annex K of the JPEG standard), rows of 8.
_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_COLOUR = (
    "17 18 24 47 18 21 26 66 24 26 56 99 47 66 99 99"  # its upper left quarter; the rest is 99
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))


@dataclass(frozen=True)
class Augmentation:
    """How much of each; shares are of pictures, sizes the largest that are drawn."""

    shift: float = 0.12  # of half a side
    zoom: float = 0.15  # natural log
    turn: float = 0.2  # radians
    mirrored: float = 0.5
    gain: float = 0.45  # brighter and darker by this share
    tint: float = 0.08  # of each channel
    grey: float = 0.1
    blur: float = 0.35
    jpeg: float = 0.35
    noise: float = 0.05  # std
    hidden: float = 0.3  # a part is grey, as where a mask is black
    covered: float = 0.15  # a part is behind something
    background: float = 0.3  # what is around the head is something else

    def __call__(
        self, pictures: Tensor, generator: torch.Generator, *, head: Tensor | None = None
    ) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> as many; `head` [S, S] in [0, 1] says where the person usually is."""
        count, size = len(pictures), pictures.shape[-1]

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator) * 2 - 1

        def some(share: float) -> Tensor:
            return (torch.rand(count, 1, 1, 1, generator=generator) < share).to(pictures)

        if head is not None:
            outside = (1 - head)[None, None].to(pictures) * some(self.background)
            pictures = pictures + outside * (plain(count, size, generator).to(pictures) - pictures)
        reach = torch.tensor([self.shift, self.shift, self.zoom, self.turn])
        pictures, _ = crop(pictures, uniform(4) * reach, size)
        mirrored = some(self.mirrored)
        pictures = mirrored * pictures.flip(-1) + (1 - mirrored) * pictures
        pictures = _covered(pictures, plain(count, size, generator), some(self.covered), generator)
        grey = some(self.grey)
        pictures = grey * pictures.mean(1, keepdim=True) + (1 - grey) * pictures
        light = 1 + self.gain * uniform(1, 1, 1) + self.tint * uniform(3, 1, 1)
        pictures = ((pictures + 1) * light - 1).clamp(-1, 1)
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        pictures = torch.lerp(pictures, soft, some(self.blur) * uniform(1, 1, 1).abs())
        pressed = some(self.jpeg).flatten().bool()
        if bool(pressed.any()):
            quality = 15 + 75 * torch.rand(int(pressed.sum()), generator=generator)
            pictures = pictures.clone()
            pictures[pressed] = compressed(pictures[pressed], quality)
        std = self.noise * uniform(1, 1, 1).abs()
        pictures = pictures + std * torch.randn(pictures.shape, generator=generator)
        nothing = torch.zeros_like(pictures)
        return _covered(pictures, nothing, some(self.hidden), generator)


def plain(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Something that is nobody [count, 3, size, size]: colours that change slowly, or grains and stripes."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    slow = F.interpolate(rand(3, 3, 3), (size, size), mode="bilinear", align_corners=True)
    slow = slow + rand(3, 1, 1)
    axis = torch.linspace(-1, 1, size)
    angle, pitch = math.pi * rand(1, 1, 1), 4 + 20 * rand(1, 1, 1).abs()
    wave = (
        pitch * (angle.cos() * axis[None, None, None] + angle.sin() * axis[None, None, :, None])
    ).sin()
    rough = F.interpolate(rand(3, 8, 8), (size, size), mode="nearest")
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    lively = torch.where(kind < 0.25, wave * rand(3, 1, 1) + rand(3, 1, 1), rough)
    return torch.where(kind < 0.5, lively, slow).clamp(-1, 1)


def compressed(pictures: Tensor, quality: Tensor) -> Tensor:
    """As a JPEG of a quality [B] in 1..100 leaves pictures [B, 3, S, S] in [-1, 1]; colours at full resolution."""
    size = pictures.shape[-2:]
    padded = F.pad(pictures, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    mix = torch.tensor(_YCBCR)
    planes = torch.einsum("ij,bjhw->bihw", mix, padded * 127.5)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50).clamp_min(0.02)
    tables = _tables()[None] * scale[:, None, None, None]  # [B, 3, 8, 8]
    dct = _dct()
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).movedim(3, 4)  # [B, 3, h, w, 8, 8]
    steps = tables.clamp_min(1)[:, :, None, None]
    kept = ((dct @ blocks @ dct.T) / steps).round() * steps
    planes = (dct.T @ kept @ dct).movedim(4, 3).flatten(4, 5).flatten(2, 3)
    back = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(mix), planes) / 127.5
    return back[..., : size[0], : size[1]].clamp(-1, 1)


def _tables() -> Tensor:
    light = torch.tensor([float(n) for n in _LUMINANCE.split()]).reshape(8, 8)
    colour = torch.full((8, 8), 99.0)
    colour[:4, :4] = torch.tensor([float(n) for n in _COLOUR.split()]).reshape(4, 4)
    return torch.stack([light, colour, colour])


def _dct() -> Tensor:
    """The orthonormal DCT-II of 8 numbers [8, 8]."""
    n = torch.arange(8.0)
    rows = (math.pi / 8 * (n[None] + 0.5) * n[:, None]).cos() * 0.5
    rows[0] /= math.sqrt(2)
    return rows


def _covered(pictures: Tensor, cover: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """A half plane or a band of the chosen pictures [B, 1, 1, 1] is what is in `cover` [B, 3, S, S]."""
    count, size = len(pictures), pictures.shape[-1]
    axis = torch.linspace(-1, 1, size)

    def rand() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    angle = 2 * math.pi * rand()
    across = angle.cos() * axis[None, None, None] + angle.sin() * axis[None, None, :, None]
    start = 0.05 + 0.8 * rand()
    width = torch.where(rand() < 0.5, 0.1 + 0.3 * rand(), torch.full_like(start, 3.0))
    inside = ((across > start) & (across < start + width)).to(pictures)
    return torch.lerp(pictures, cover.to(pictures), inside * chosen)
