"""Shares as bars."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw

WIDTH, LINE, LEFT, TOP = 640, 34, 240, 44
INK, GRID, BAR = (40, 40, 40), (222, 222, 222), (60, 110, 170)


def draw_bars(shares: Mapping[str, float], title: str) -> torch.Tensor:
    """IMAGE [1, H, 640, 3] of named shares between 0 and 1, one bar each; those below zero are written only."""
    height = TOP + LINE * len(shares) + 20
    picture = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((12, 14), title, fill=INK)
    room = WIDTH - LEFT - 70
    for quarter in range(5):
        x = LEFT + room * quarter / 4
        draw.line([(x, TOP - 6), (x, height - 14)], fill=GRID)
    for i, (name, share) in enumerate(shares.items()):
        y = TOP + i * LINE
        draw.text((12, y + 6), name, fill=INK)
        if share > 0:
            draw.rectangle([LEFT, y, LEFT + room * min(1.0, share), y + LINE - 10], fill=BAR)
        draw.text((LEFT + room * min(1.0, max(0.0, share)) + 6, y + 6), f"{share:.3f}", fill=INK)
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255
