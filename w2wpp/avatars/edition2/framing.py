"""Where a face is in a picture, and pictures brought into one frame.

A placement [B, 4] is right and down in half frames (of the shorter side's picture, which is square here), the natural
log of the scale and the turn in radians: a point (x, y) of the face's own coordinates lies at
``(right, down) + scale * R(turn) (x, y)``. Placements form a group, so crops of crops need no special case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 1.05  # half side of the frame that faces are brought into, in the face's own coordinates
FINER = 2  # samples per pixel and side, averaged: shrinking does not alias


def matrix(placement: Tensor) -> Tensor:
    """Placement [B, 4] -> similarity [B, 2, 3] from the face's coordinates to the frame's."""
    right, down, log_scale, turn = placement.unbind(1)
    cos, sin = log_scale.exp() * turn.cos(), log_scale.exp() * turn.sin()
    rows = torch.stack([cos, -sin, right, sin, cos, down], dim=1)
    return rows.unflatten(1, (2, 3))


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The placement [B, 4] of something placed at ``inner`` in a frame that itself lies at ``outer``."""
    linear, offset = matrix(outer).split([2, 1], dim=2)
    position = (linear @ inner[:, :2, None] + offset)[:, :, 0]
    return torch.cat([position, outer[:, 2:] + inner[:, 2:]], dim=1)


def inverse(placement: Tensor) -> Tensor:
    """The placement [B, 4] that undoes ``placement``: ``compose(p, inverse(p))`` is the identity."""
    back = -placement[:, 2:]
    zero = torch.zeros_like(placement[:, :2])
    linear = matrix(torch.cat([zero, back], dim=1))[:, :, :2]
    return torch.cat([-(linear @ placement[:, :2, None])[:, :, 0], back], dim=1)


def crop(pictures: Tensor, placement: Tensor, size: int, *, window: float = WINDOW) -> Tensor:
    """Pictures [B, 3, S, S] -> [B, 3, size, size]: the square of half side ``window`` around each face, upright.

    What lies outside of a picture repeats its edge.
    """
    fine = size * FINER
    axis = ((torch.arange(fine) + 0.5) / fine * 2 - 1) * window
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1)  # [fine, fine, 3]
    grid = torch.einsum("bij,hwj->bhwi", matrix(placement), points)
    sampled = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, FINER)
