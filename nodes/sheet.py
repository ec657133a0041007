"""Faces side by side as one IMAGE."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP = 4
SMALLEST = 128  # side that faces are scaled to, or their numbers could not be read
BACKGROUND, INK, CHOSEN = (32, 32, 32), (230, 230, 230), (255, 176, 0)


def draw_sheet(
    faces: Sequence[torch.Tensor], labels: Sequence[str], *, columns: int, chosen: int | None = None
) -> torch.Tensor:
    """IMAGE [1, H, W, 3] of faces [h, w, 3] of bytes, row by row, each with a label below."""
    height, width, _ = faces[0].shape
    scale = max(1, math.ceil(SMALLEST / width))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=max(14, width // 10))
    below = font.size + 8
    rows = math.ceil(len(faces) / columns)
    size = (columns * (width + GAP) + GAP, rows * (height + below + GAP) + GAP)
    sheet = Image.new("RGB", tuple(map(int, size)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (face, label) in enumerate(zip(faces, labels)):
        x = GAP + i % columns * (width + GAP)
        y = int(GAP + i // columns * (height + below + GAP))
        picture = Image.fromarray(face.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(picture, (x, y))
        if i == chosen:
            draw.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), outline=CHOSEN, width=3)
        place = (x + width / 2, y + height + below / 2)
        draw.text(place, label, INK if i != chosen else CHOSEN, font=font, anchor="mm")
    return torch.from_numpy(np.asarray(sheet).copy()).float()[None] / 255
