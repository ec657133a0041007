"""Contact sheets: pictures of the miniature world side by side, enlarged and labelled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...files.pictures import save_picture

SCALE, GAP, TEXT = 3, 4, 16  # enlargement, pixels between pictures, height of a line of text


@dataclass(frozen=True)
class Strip:
    """A block of pictures [rows * columns, 3, H, W] under a title."""

    title: str
    pictures: Tensor
    columns: int


def to_image(pictures: Tensor, columns: int, *, scale: int = SCALE) -> Image.Image:
    """Pictures [B, 3, H, W] in [-1, 1] in rows of ``columns``."""
    rows = -(-len(pictures) // columns)
    side = pictures.shape[-1] * scale + GAP
    sheet = Image.new("RGB", (columns * side - GAP, rows * side - GAP), "white")
    for i, picture in enumerate(pictures):
        tile = to_pil(picture).resize((side - GAP, side - GAP), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return sheet


def to_pil(picture: Tensor) -> Image.Image:
    """One picture [3, H, W] in [-1, 1]."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_sheet(strips: list[Strip], path: Path, *, scale: int = SCALE) -> None:
    """Write strips below each other, each under its title."""
    images = [
        (strip.title, to_image(strip.pictures, strip.columns, scale=scale)) for strip in strips
    ]
    width = max(image.width for _, image in images)
    height = sum(image.height + TEXT + 3 * GAP for _, image in images)
    sheet = Image.new("RGB", (width + 2 * GAP, height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for title, image in images:
        draw.text((GAP, top), title, fill="black")
        sheet.paste(image, (GAP, top + TEXT))
        top += image.height + TEXT + 3 * GAP
    save_picture(sheet, path)
