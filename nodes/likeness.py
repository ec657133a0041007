"""How LoRAs compare, as pictures: a matrix of cosines, and a map on which alike ones lie together."""

import numpy as np
import torch
from PIL import Image, ImageDraw

INK, GRID, DOT = (40, 40, 40), (222, 222, 222), (60, 110, 170)
WARM, COLD = (200, 70, 40), (60, 110, 170)  # cosines of 1 and of -1
SIDE = 720
LONGEST = 18  # letters of a name


def draw_matrix(names: list[str], cosines: torch.Tensor) -> torch.Tensor:
    """IMAGE [1, H, W, 3] of cosines [N, N]; the numbers are written where there is room for them."""
    count = len(names)
    cell = max(6, min(64, SIDE // count))
    labelled = cell >= 12
    left = 130 if labelled else 8
    size = left + cell * count + 8
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(cosines.tolist()):
        for j, value in enumerate(row):
            x, y = left + j * cell, left + i * cell
            draw.rectangle([x, y, x + cell - 1, y + cell - 1], fill=_shade(value))
            if cell >= 34:
                draw.text((x + 4, y + cell // 2 - 6), f"{value:.2f}", fill=INK)
        if labelled:
            draw.text((4, left + i * cell + cell // 2 - 6), _plain(names[i]), fill=INK)
    if labelled:
        _write_above(picture, names, left, cell)
    return _image(picture)


def draw_map(names: list[str], positions: torch.Tensor) -> torch.Tensor:
    """IMAGE [1, 720, 720, 3] of positions [N, 2]; both directions have the same scale."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    reach = float(positions.abs().max()) or 1.0
    middle, margin = SIDE / 2, 90
    draw.line([(0, middle), (SIDE, middle)], fill=GRID)
    draw.line([(middle, 0), (middle, SIDE)], fill=GRID)
    for name, (x, y) in zip(names, positions.tolist()):
        across = middle + x / reach * (middle - margin)
        down = middle - y / reach * (middle - margin)
        draw.ellipse([across - 4, down - 4, across + 4, down + 4], fill=DOT)
        draw.text((across + 7, down - 6), _plain(name), fill=INK)
    return _image(picture)


def _shade(value: float) -> tuple[int, int, int]:
    """White at zero, towards a colour on either side."""
    colour, share = (WARM, value) if value >= 0 else (COLD, -value)
    share = min(1.0, share)
    red, green, blue = (round(255 + (c - 255) * share) for c in colour)
    return red, green, blue


def _write_above(picture: Image.Image, names: list[str], left: int, cell: int) -> None:
    """Names upwards over their columns."""
    for j, name in enumerate(names):
        strip = Image.new("RGB", (left - 10, 14), "white")
        ImageDraw.Draw(strip).text((0, 0), _plain(name), fill=INK)
        picture.paste(strip.rotate(90, expand=True), (left + j * cell + cell // 2 - 7, 6))


def _plain(name: str) -> str:
    """As the built-in font can write it."""
    text = name if len(name) <= LONGEST else name[: LONGEST - 2] + ".."
    return text.encode("latin-1", "replace").decode("latin-1")


def _image(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255
