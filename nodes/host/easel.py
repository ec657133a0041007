"""What people are painted on, whoever they are painted for: sides, rows at once, and the bytes that come of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import grid, usual_size
from .plan import plan_run

SAMPLER, SCHEDULER = (
    "dpmpp_2m",
    "normal",
)  # no noise of its own, so a face does not depend on its row


def side_of(model: Any, size: int, largest: int) -> int:
    """Side of a picture in pixels, a multiple of what the UNet needs; of `size` 0 the model's own, up to `largest`."""
    cell = grid(model)
    side = size or min(usual_size(model), largest)
    return max(cell, round(side / cell) * cell)


def latent_shape(model: Any, side: int) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents."""
    latents = model.model.latent_format
    # Hosts of 2025 do not say; they know the factor of 8 only.
    small = side // getattr(latents, "spacial_downscale_ratio", 8)
    return latents.latent_channels, small, small


def rows_at_once(model: Any, side: int, most: int) -> int:
    """How many pictures go through the UNet at once, two prompts each: as many as fit into memory, up to `most`."""
    plan = plan_run(model, (most * 2, *latent_shape(model, side)), gradients=False)
    return max(1, min(most, plan.rows // 2))


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> pictures [B, H, W, 3] of bytes."""
    pictures = vae.decode(latents)
    if pictures.ndim == 5:  # VAEs of videos
        pictures = pictures.reshape(-1, *pictures.shape[-3:])
    return (pictures[..., :3].float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
