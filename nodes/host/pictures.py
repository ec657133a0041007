"""Pictures and masks as a UNet of the host's sees them."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...w2wpp.errors import ConfigError
from .model import grid, has_frames, model_name


def picture_latents(
    model: Any, vae: Any, image: Tensor, mask: Tensor | None, pixels: int
) -> tuple[Tensor, Tensor | None]:
    """Pictures [n, H, W, 3] as the UNet sees them [n, C, h, w], and masks of any size as weights [n, 1, h, w].

    Pictures are scaled to the area of a square with sides of ``pixels``; their shape is kept, up to what the UNet's
    levels can divide.
    """
    if pixels < 1:
        raise ConfigError(f"The resolution of the pictures is positive. Got {pixels}.")
    count, height, width, _ = image.shape
    scale = pixels / (height * width) ** 0.5
    cell = grid(model)
    size = [max(cell, round(side * scale / cell) * cell) for side in (width, height)]
    scaled = comfy.utils.common_upscale(image[..., :3].movedim(-1, 1), *size, "area", "disabled")
    latents = _encoded(model, vae, scaled.movedim(1, -1))
    if mask is None:
        return latents, None
    weights = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(weights) not in (1, count):
        raise ConfigError(
            f"There are {count} pictures and {len(weights)} masks; connect one for all, or one for each."
        )
    weights = torch.nn.functional.interpolate(weights, latents.shape[-2:], mode="area").clamp(0, 1)
    weights = weights.expand(count, -1, -1, -1)
    if bool((weights.sum((1, 2, 3)) == 0).any()):
        raise ConfigError("The mask is empty. It should be white where the person is.")
    return latents, weights.to(latents.device)


def given_latents(model: Any, latent: dict[str, Any]) -> Tensor:
    """A LATENT of the host's as the model sees it, [n, C, h, w]."""
    base, samples = model.model, latent["samples"]
    channels, dimensions = base.latent_format.latent_channels, 5 if has_frames(base) else 4
    if samples.ndim != dimensions or samples.shape[1] != channels:
        raise ConfigError(
            f"{model_name(model)} works on latents of {channels} channels; this LATENT is {list(samples.shape)}. "
            "Encode pictures with the VAE that belongs to the model."
        )
    found = base.process_latent_in(samples.clone()).float()
    return found[:, :, 0] if has_frames(base) else found


def painted_pictures(model: Any, vae: Any, latents: Tensor) -> Tensor | None:
    """Latents [n, C, h, w] as the UNet sees them, decoded: [n, 3, H, W] in [-1, 1]; none where the VAE does not give
    pictures."""
    decode = getattr(vae, "decode", None)
    if not callable(decode):
        return None
    base = model.model
    latents = base.process_latent_out(latents.float().cpu())
    found = decode(latents.unsqueeze(2) if has_frames(base) else latents)
    if found.ndim == 5:  # VAEs of videos
        found = found.reshape(-1, *found.shape[-3:])
    if found.ndim != 4 or len(found) != len(latents) or found.shape[-1] < 3:
        return None
    return found[..., :3].float().cpu().clamp(0, 1).movedim(-1, 1) * 2 - 1


def _encoded(model: Any, vae: Any, pictures: Tensor) -> Tensor:
    """[n, H, W, 3] -> [n, C, h, w]; a VAE of videos would take several pictures for the frames of one."""
    base = model.model
    if has_frames(base):
        latents = torch.cat([vae.encode(picture[None]) for picture in pictures]).clone()
        latents = latents.unsqueeze(2) if latents.ndim == 4 else latents
    else:
        latents = vae.encode(pictures).clone()
    channels = base.latent_format.latent_channels
    if latents.shape[1] != channels or latents.ndim - 2 != (3 if has_frames(base) else 2):
        raise ConfigError(
            f"{model_name(model)} works on latents of {channels} channels; this VAE gives {list(latents.shape)}. "
            "Connect the VAE that belongs to the model."
        )
    latents = base.process_latent_in(latents).float()
    return latents.squeeze(2) if has_frames(base) else latents
