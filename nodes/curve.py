"""A loss curve as a picture."""

import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50  # margins
INK, GRID, EACH, TREND = (40, 40, 40), (222, 222, 222), (140, 175, 215), (200, 70, 40)


def draw_curve(losses: list[float], title: str, *, comparable: bool = True) -> torch.Tensor:
    """IMAGE [1, 360, 640, 3] of the loss after each step, and the best so far.

    Losses that are not `comparable`, each under other noise, have no best: a running mean takes its place. The axis
    of losses is logarithmic where they span more than a factor of ten.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    points = [(x, y) for x, y in enumerate(losses, start=1) if math.isfinite(y)]
    draw.text((LEFT, 12), title, fill=INK)
    if points:
        _draw(draw, points, comparable)
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255


def _draw(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], comparable: bool) -> None:
    trend = _best(points) if comparable else _running_mean(points)
    ys = [y for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) > 10 * min(ys)
    height = math.log10 if logarithmic else float
    low, high = height(min(ys)), height(max(ys))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        up = (height(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    for i in range(5):
        level = low + (high - low) * i / 4
        value = 10**level if logarithmic else level
        _, y = place(first, value)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        draw.text((8, y - 6), f"{value:.4g}", fill=INK)
        x, _ = place(first + (last - first) * i / 4, points[0][1])
        draw.text((x - 8, HEIGHT - BOTTOM + 8), f"{first + (last - first) * i / 4:.0f}", fill=INK)
    red = "best so far" if comparable else "running mean"
    draw.text((WIDTH // 2 - 60, HEIGHT - 22), f"step (blue: loss, red: {red})", fill=INK)
    for line, colour, width in ((points, EACH, 1), (trend, TREND, 2)):
        placed = [place(*point) for point in line]
        if len(placed) == 1:
            placed *= 2
        draw.line(placed, fill=colour, width=width, joint="curve")


def _best(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return list(zip((x for x, _ in points), itertools.accumulate((y for _, y in points), min)))


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Over a fifth of the run on both sides."""
    reach = max(1, len(points) // 5)
    windows = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(points, windows)]
