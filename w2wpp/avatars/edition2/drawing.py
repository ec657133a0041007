"""Soft-edged painting with signed distances: a canvas for a batch of pictures, and the shapes painted on it.

Distances are negative inside. Lengths are in the coordinates that the caller draws in; the canvas is told how long a
pixel is in them, so that edges are one pixel soft at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

Number = Tensor | float


class Canvas:
    """Pictures [B, 3, S, S] in [0, 1] and the length of their pixels [B, 1, 1] in the shapes' coordinates."""

    def __init__(self, pixels: Tensor, pixel: Tensor) -> None:
        self.pixels = pixels
        self.pixel = pixel

    def cover(self, distance: Tensor, softness: float = 0.0) -> Tensor:
        """Signed distance [B, S, S] -> coverage [B, S, S]; edges are a pixel and ``softness`` wide."""
        width = self.pixel + softness
        return (0.5 - distance / width).clamp(0, 1)

    def paint(self, coverage: Tensor, colour: Tensor) -> None:
        """Blend ``colour``, [B, 3] or [B, 3, S, S], over the pictures as far as ``coverage`` [B, S, S] says."""
        colour = colour[:, :, None, None] if colour.ndim == 2 else colour
        self.pixels = torch.lerp(self.pixels, colour, coverage[:, None])


def ellipse(x: Tensor, y: Tensor, width: Number, height: Number) -> Tensor:
    """Distance to an axis-aligned ellipse of half axes ``width`` and ``height``: first-order, exact on the edge."""
    a, b = x / width, y / height
    value = torch.sqrt(a.square() + b.square() + 1e-9)
    slope = torch.sqrt((a / width).square() + (b / height).square() + 1e-9)
    return value * (value - 1) / slope


def box(x: Tensor, y: Tensor, width: Number, height: Number, *, corner: Number = 0.0) -> Tensor:
    """Distance to a box of half sides ``width`` and ``height`` with round corners of radius ``corner``."""
    right, down = x.abs() - (width - corner), y.abs() - (height - corner)
    outside = torch.sqrt(right.clamp_min(0).square() + down.clamp_min(0).square() + 1e-12)
    return outside + torch.maximum(right, down).clamp_max(0) - corner


def arc(x: Tensor, y: Tensor, width: Number, bend: Number, thickness: Number) -> Tensor:
    """Distance to a stroke along the parabola y = bend (x / width)^2 that tapers to its ends at x = +-width."""
    along = x / width
    taper = (1 - along.square()).clamp_min(0)
    inside = (y - bend * along.square()).abs() - thickness * (0.35 + 0.65 * taper)
    return torch.maximum(inside, x.abs() - width)


def union(*distances: Tensor) -> Tensor:
    """Distance to what lies in either shape: the smaller one."""
    return torch.stack(torch.broadcast_tensors(*distances)).amin(0)


def intersection(*distances: Tensor) -> Tensor:
    """Distance to what lies in both shapes: the larger one."""
    return torch.stack(torch.broadcast_tensors(*distances)).amax(0)


def colour(*channels: Tensor) -> Tensor:
    """Red, green and blue [B] each -> colours [B, 3] in [0, 1]."""
    return torch.stack(channels, dim=1).clamp(0, 1)
