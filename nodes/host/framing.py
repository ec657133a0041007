"""The host's pictures and masks, brought into the frame in which a space's people were photographed."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...w2wpp import Space
from ...w2wpp.errors import ConfigError
from ...w2wpp.inversion.framing import Framed, Framing
from ...w2wpp.placement import matrix

FRAMINGS = ("auto", "off")
PREVIEW = 384  # pixels of the longer side
LINE = (255, 170, 0)


def frame_pictures(
    space: Space, image: Tensor, mask: Tensor | None, pixels: int, *, how: str = "auto"
) -> Framed:
    """IMAGE [n, H, W, 3 or 4] and MASK of any size, cut to squares with sides of ``pixels``."""
    if how not in FRAMINGS:
        raise ConfigError(f"Framing is {' or '.join(FRAMINGS)}. Got {how!r}.")
    start = space.start
    locator = start if start is not None and start.locates else None
    layers = image.movedim(-1, 1).float().cpu().clone()  # [n, 3 or 4, H, W]
    return Framing(space.frame, locator, crop=how == "auto")(
        layers[:, :3] * 2 - 1,
        pixels,
        mask=None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu().clone(),
        alpha=layers[:, 3:] if layers.shape[1] == 4 else None,
    )


def framed_image(framed: Framed) -> tuple[Tensor, Tensor | None]:
    """As IMAGE [n, S, S, 3], and as MASK [n, S, S] where something counts less than the rest."""
    mask = framed.weights[:, 0] if framed.weighted else None
    return (framed.pictures.movedim(1, -1) + 1) / 2, mask


def crop_image(framed: Framed) -> Tensor:
    """IMAGE [n, S, S, 3] of what was used, grey where nothing counts."""
    return ((framed.pictures * framed.weights).movedim(1, -1) + 1).div(2).clamp(0, 1)


def framed_preview(image: Tensor, framed: Framed) -> Image.Image:
    """The first picture with its frame drawn into it."""
    height, width = image.shape[1:3]
    pixels = (image[0, ..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    picture = Image.fromarray(np.asarray(pixels), "RGB")
    scale = PREVIEW / max(height, width)
    size = [max(1, round(side * scale)) for side in (width, height)]
    picture = picture.resize(size)
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1], [-1, -1, 1]])
    places = corners @ matrix(framed.placement[:1])[0].T * (min(size) / 2)
    line = [(x + size[0] / 2, y + size[1] / 2) for x, y in places.tolist()]
    ImageDraw.Draw(picture).line(line, fill=LINE, width=3, joint="curve")
    return picture
