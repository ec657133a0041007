"""What a start network sees with that did not learn to see by itself: a pretrained vision model of somebody's.

A space's file holds none of that model, only what is needed to know it again: its features of three patterns. Another
precision moves them by a per cent or two, other weights by far more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigError, DataError, ShapeError
from .placement import crop

LARGEST = 224  # pixels per side of what a vision model is shown; it may scale that as it likes
AT_ONCE = 32  # pictures
PATTERNS, PATTERN = 3, 64  # how many, and pixels per side
SAME = 0.1  # relative distance of features up to which a model is the one that was taught with


class Vision(Protocol):
    """A pretrained network that describes pictures."""

    @property
    def name(self) -> str:
        """For people: its kind and its sizes."""

    def describe(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] in [-1, 1] -> features [n, V], ordinary tensors on any device."""


@dataclass(frozen=True)
class Sight:
    """With what a start network sees, and where in the frame it looks."""

    name: str  # of the vision model
    features: int  # V
    size: int = LARGEST  # pixels per side of what it is shown: paintings had no more
    placement: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the head: right, down, log scale

    def __post_init__(self) -> None:
        good = self.features >= 1 and 1 <= self.size <= LARGEST
        if not good or not all(math.isfinite(n) for n in self.placement):
            raise ConfigError(
                f"A sight has features, and looks at a finite place in 1 to {LARGEST} pixels per side. Got {self}."
            )

    def look(self, vision: Vision, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] in the frame -> features [n, V] of the head in them, on the CPU.

        Raises DataError where the model gives anything but finite features of this size.
        """
        place = torch.tensor([[*self.placement, 0.0]])
        parts = []
        for some in pictures.split(AT_ONCE):
            shown = crop(some.float().cpu(), place.expand(len(some), -1), self.size)[0]
            parts.append(_described(vision, shown))
        seen = torch.cat(parts) if parts else torch.zeros(0, self.features)
        if seen.shape[1] != self.features:
            raise DataError(self.refusal(vision, f"it gives {seen.shape[1]} features"))
        return seen

    def require(self, vision: Vision | None, known: Tensor) -> Vision:
        """The vision model, if it describes patterns as the one did that was taught with: `known` [3, V].

        Raises ConfigError for none and for another one.
        """
        if vision is None:
            raise ConfigError(
                f"The start network of this space sees with the vision model {self.name}, and none is connected. "
                "Connect it to 'clip_vision'. (Spaces taught without one need none.)"
            )
        found = _described(vision, patterns())
        if found.shape != known.shape:
            raise ConfigError(
                self.refusal(vision, f"it gives {found.shape[1]} features, not {self.features}")
            )
        off = float((found - known.float().cpu()).norm() / known.float().norm().clamp_min(1e-6))
        if off > SAME:
            raise ConfigError(
                self.refusal(vision, f"its features of test patterns differ by {off:.0%}")
            )
        return vision

    def refusal(self, vision: Vision, why: str) -> str:
        """What is said of another vision model."""
        return (
            f"The start network of this space was taught with the vision model {self.name}. Another one is connected, "
            f"{vision.name}: {why}. Connect the one it was taught with, or teach the space again with this one."
        )

    def to_json(self) -> dict[str, Any]:
        """As files hold it."""
        return {
            "name": self.name, "features": self.features, "size": self.size, "placement": list(self.placement)
        }  # fmt: skip

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Sight:
        """Raises ConfigError for anything else."""
        place = facts.get("placement")
        if not isinstance(place, list) or len(place) != 3:
            raise ConfigError(f"a sight looks at a place of three numbers. Got {place!r}.")
        right, down, log_scale = (float(n) for n in place)
        sizes = int(facts["features"]), int(facts["size"])
        return cls(str(facts["name"]), *sizes, (right, down, log_scale))


@dataclass(frozen=True, eq=False)
class Eye:
    """A sight with its vision model."""

    sight: Sight
    vision: Vision

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] in the frame -> features [n, V] on the CPU."""
        return self.sight.look(self.vision, pictures)

    def __deepcopy__(self, memo: dict[int, Any]) -> Eye:
        return self  # the vision model is somebody else's, and large


def patterns() -> Tensor:
    """Three pictures [3, 3, 64, 64] in [-1, 1] by which a vision model is known: slopes, stripes, and a disc."""
    axis = (torch.arange(PATTERN) + 0.5) / PATTERN * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    slopes = torch.stack([x, y, -x])
    stripes = torch.stack([(9 * x).sin(), (7 * y).sin(), (6 * (x + y)).cos()])
    disc = ((0.6 - (x.square() + y.square()).sqrt()) * 8).tanh()
    return torch.stack([slopes, stripes, torch.stack([disc, 0.5 * disc * y, -disc])])


def known_by(vision: Vision) -> Tensor:
    """What tells a vision model from others: its features of the patterns [3, V]."""
    return _described(vision, patterns())


def head_in(
    right: float, down: float, scale: float, *, margin: float = 1.3
) -> tuple[float, float, float]:
    """Where to look for a head whose box has a middle and a half side, with some room: all of the frame at most."""
    wide = scale * margin
    return (0.0, 0.0, 0.0) if wide >= 0.95 else (right, down, math.log(wide))


def _described(vision: Vision, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        seen = vision.describe(pictures)
    if seen.ndim != 2 or len(seen) != len(pictures):
        raise ShapeError(
            f"A vision model describes {len(pictures)} pictures by [{len(pictures)}, V]. Got {list(seen.shape)}."
        )
    seen = seen.float().cpu()
    if not bool(torch.isfinite(seen).all()):
        raise DataError(
            f"The vision model {vision.name} gives NaN or infinite features. Load it in a higher precision."
        )
    return seen
