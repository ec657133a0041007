"""Where a frame lies in a picture, and the crops that frames cut.

A picture's coordinates go right and down from its middle, in halves of its shorter side, so that aspect ratios do not
matter. A placement [B, 4] is right, down, the natural log of the scale, and the turn in radians (clockwise to the eye,
for y points down) of a square frame: the point (x, y) of the frame, which reaches from -1 to 1, lies at
``(right, down) + scale * R(turn) (x, y)``. Placements form a group: a crop of a crop is a crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, ShapeError

FINER = 2  # samples per pixel and side of a crop, averaged


def matrix(placement: Tensor) -> Tensor:
    """Placement [B, 4] -> similarity [B, 2, 3] from the frame's coordinates to the picture's."""
    right, down, log_scale, turn = placement.unbind(1)
    cos, sin = log_scale.exp() * turn.cos(), log_scale.exp() * turn.sin()
    rows = torch.stack([cos, -sin, right, sin, cos, down], dim=1)
    return rows.unflatten(1, (2, 3))


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The placement [B, 4] of what lies at ``inner`` in a frame that itself lies at ``outer``."""
    linear, offset = matrix(outer).split([2, 1], dim=2)
    position = (linear @ inner[:, :2, None] + offset)[:, :, 0]
    return torch.cat([position, outer[:, 2:] + inner[:, 2:]], dim=1)


def inverse(placement: Tensor) -> Tensor:
    """The placement [B, 4] that undoes another: composed with it, the frame is the whole picture."""
    back = -placement[:, 2:]
    zero = torch.zeros_like(placement[:, :2])
    linear = matrix(torch.cat([zero, back], dim=1))[:, :, :2]
    return torch.cat([-(linear @ placement[:, :2, None])[:, :, 0], back], dim=1)


def crop(
    pictures: Tensor, placement: Tensor, size: int, *, edge: str = "border"
) -> tuple[Tensor, Tensor]:
    """Pictures [B or 1, C, H, W] -> what lies in the frames [B, C, size, size], and how much of that is picture.

    The share of picture is [B, 1, size, size]. Outside of a picture its edge is repeated (`edge="border"`) or nothing
    is, zeros (`edge="zeros"`). Large pictures are averaged on the way down, so that nothing aliases.
    """
    count = len(placement)
    if pictures.ndim != 4 or len(pictures) not in (1, count) or placement.shape != (count, 4):
        raise ShapeError(
            "A crop takes pictures [B or 1, C, H, W] and a placement [B, 4]. Got "
            f"{list(pictures.shape)} and {list(placement.shape)}."
        )
    height, width = pictures.shape[-2:]
    shorter = min(height, width)
    fine = size * FINER
    pixels_apart = float(placement[:, 2].exp().min()) * shorter / fine
    if pixels_apart >= 2:  # what lies between samples takes part
        smaller = [math.ceil(side / int(pixels_apart)) for side in (height, width)]
        pictures = F.interpolate(pictures, smaller, mode="area")
    pictures = pictures.expand(count, -1, -1, -1)
    axis = (torch.arange(fine, device=pictures.device) + 0.5) / fine * 2 - 1
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1)  # [fine, fine, 3]
    grid = torch.einsum("bij,hwj->bhwi", matrix(placement.to(pictures)), points.to(pictures))
    grid = grid * grid.new_tensor([shorter / width, shorter / height])
    sampled = F.grid_sample(pictures, grid, padding_mode=edge, align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None].to(pictures)
    return F.avg_pool2d(sampled, FINER), F.avg_pool2d(inside, FINER)


def place_box(box: Tensor, size: tuple[int, int]) -> Tensor:
    """A box [B, 4] (left, top, right, bottom in pixels) of pictures of a size (height, width) -> its middle and half
    sides [B, 4] in the picture's coordinates."""
    height, width = size
    half = min(height, width) / 2
    left, top, right, bottom = box.unbind(1)
    middle = torch.stack([(left + right - width) / 2, (top + bottom - height) / 2], dim=1)
    return torch.cat([middle, torch.stack([right - left, bottom - top], dim=1) / 2], dim=1) / half


@dataclass(frozen=True)
class Sighting:
    """What a locator says of B pictures."""

    placement: Tensor  # [B, 4] of the frame, as the space's people were photographed
    certainty: Tensor  # [B] in [0, 1] that somebody is there


class Locator(Protocol):
    """Says where in a picture the frame would lie in which a space's people were photographed."""

    def locate(self, pictures: Tensor) -> Sighting:
        """Squares [B, 3, S, S] in [-1, 1] of any size."""


@dataclass(frozen=True)
class Frame:
    """How the people of a space were photographed: where in the square pictures their heads are.

    Numbers are those of the picture's coordinates. `spread` is one standard deviation of right, down, log scale and
    turn over the pictures: what lies within is framed as in training.
    """

    right: float = 0.0
    down: float = 0.0
    half_width: float = 0.62
    half_height: float = 0.72
    turn: float = 0.0  # radians
    spread: tuple[float, float, float, float] = (0.08, 0.08, 0.08, 0.1)

    VERSION = 1

    def __post_init__(self) -> None:
        numbers = (self.right, self.down, self.half_width, self.half_height, self.turn)
        if len(self.spread) != 4 or not all(math.isfinite(n) for n in (*numbers, *self.spread)):
            raise ConfigError(f"A frame holds finite numbers, and four of spread. Got {self}.")
        if min(self.half_width, self.half_height) <= 0 or min(self.spread) < 0:
            raise ConfigError(f"The head of a frame has a size, and a spread of 0 or more: {self}.")

    @property
    def scale(self) -> float:
        """Half a side of the square as large as the head's box."""
        return math.sqrt(self.half_width * self.half_height)

    def around(self, head: Tensor) -> Tensor:
        """The placement [B, 4] of the frame in which heads (middle and half sides [B, 4]) lie as in training."""
        log = (head[:, 2] * head[:, 3]).log() / 2 - math.log(self.scale)
        place = torch.stack([*head[:, :2].unbind(1), log, torch.zeros_like(log)], dim=1)
        own = torch.tensor([[self.right, self.down, 0.0, 0.0]]).to(place)
        return compose(place, inverse(own))

    def head(self, placement: Tensor) -> Tensor:
        """Where the head lies, middle and half sides [B, 4], if the frame lies at a placement [B, 4]."""
        own = torch.tensor([[self.right, self.down, 0.0, 0.0]]).to(placement)
        middle = compose(placement, own.expand(len(placement), -1))[:, :2]
        half = torch.tensor([self.half_width, self.half_height]).to(placement)
        return torch.cat([middle, placement[:, 2:3].exp() * half], dim=1)

    def as_photographed(self, placement: Tensor, *, stds: float = 1.25) -> Tensor:
        """Whether frames at placements [B, 4] lie so close to the whole picture as they do in training [B]."""
        spread = torch.tensor(self.spread).to(placement).clamp_min(1e-6)
        return (placement.abs() <= stds * spread).all(1)

    @classmethod
    def of_heads(cls, heads: Tensor) -> Frame:
        """Measured on heads (middle and half sides [n, 4]) in square training pictures: medians, and their spread."""
        if heads.ndim != 2 or heads.shape[1] != 4 or not len(heads):
            raise ShapeError(
                f"A frame is measured on the boxes of heads [n, 4]. Got {list(heads.shape)}."
            )
        x, y, half_width, half_height = (
            round(n, 4) for n in heads.double().median(0).values.tolist()
        )
        log = heads[:, 2:].log().sum(1, keepdim=True) / 2
        moved = torch.cat([heads[:, :2], log], dim=1).double()
        stds = moved.std(0).tolist() if len(heads) > 1 else cls.spread[:3]
        right, down, larger = (round(n, 4) for n in stds)
        spread = (right, down, larger, cls.spread[3])
        return cls(x, y, half_width, half_height, spread=spread)

    def to_json(self) -> dict[str, Any]:
        """As files hold it."""
        return {"version": self.VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Frame:
        """Raises ConfigError for another version or odd numbers."""
        if not isinstance(facts, Mapping) or facts.get("version") != cls.VERSION:
            found = facts.get("version") if isinstance(facts, Mapping) else facts
            raise ConfigError(f"this release knows frames of version {cls.VERSION}, not {found!r}.")
        names = ("right", "down", "half_width", "half_height", "turn")
        spread = facts["spread"]
        if not isinstance(spread, list) or len(spread) != 4:
            raise ConfigError(f"the spread of a frame is four numbers, not {spread!r}.")
        right, down, log, turn = (float(n) for n in spread)
        return cls(**{n: float(facts[n]) for n in names}, spread=(right, down, log, turn))
