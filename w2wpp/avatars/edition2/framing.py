"""Where a face is in a picture, and pictures brought into one frame.

Placements are those of ``w2wpp.placement``, in units of the face: pictures are square here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...placement import FINER, compose, inverse, matrix

__all__ = ["WINDOW", "compose", "crop", "inverse", "matrix"]

WINDOW = 1.05  # half side of the frame that faces are brought into, in the face's own coordinates


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
