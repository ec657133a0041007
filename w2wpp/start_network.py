"""The amortised start: a small network from a picture to a latent, trained with a space and stored in its file.

It costs one pass of its own and none of the UNet. An answer that is only a regression is shorter than real latents;
calibration on paintings (`training.fit_start.LabelMap`) makes up for that, or by hand `scale`. One that was taught on
moved pictures also says where the person is, and one that was measured tells pictures unlike those it was taught on.
One with a sight sees with a pretrained vision model, which has to be brought along.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, ShapeError
from .placement import Sighting
from .sight import PATTERNS, Eye, Sight, Vision

_SIZES = ("size", "width", "features")
PLACE = 4  # numbers of a placement
FARTHEST = (1.5, 1.5, 1.0, 1.0)  # what a locator answers at most: right, down, log scale, turn
NEAREST = (-1.5, -1.5, -1.8, -1.0)


class PictureNetwork(nn.Module):
    """Pictures [n, 3, H, W] in [-1, 1] -> answers [n, A]: convolutions, then places count."""

    def __init__(
        self, answers: int, *, size: int = 32, width: int = 32, features: int = 128
    ) -> None:
        super().__init__()
        if size % 8 or width % 8 or min(size, width, features, answers) < 1:
            raise ConfigError(
                f"A start network's size and width are multiples of 8. Got {size=}, {width=}."
            )
        self.size, self.width, self.features = size, width, features
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        blocks = [HalvingBlock(width, 2 * width), HalvingBlock(2 * width, 3 * width)]
        self.blocks = nn.ModuleList(blocks)
        self.neck = nn.Linear(3 * width * (size // 8) ** 2, features)
        self.head = nn.Linear(features, answers)

    @property
    def sizes(self) -> dict[str, int]:
        """What says how large it is."""
        return {"size": self.size, "width": self.width, "features": self.features}

    def describe(self, pictures: Tensor) -> Tensor:
        """Pictures of any size -> features [n, F]. Raises ShapeError for anything but [n, 3, H, W]."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ShapeError(
                f"A start network reads pictures [n, 3, H, W]. Got {list(pictures.shape)}."
            )
        if pictures.shape[-2:] != (self.size, self.size):
            pictures = F.interpolate(
                pictures, (self.size, self.size), mode="bilinear", antialias=True
            )
        hidden = self.stem(F.pixel_unshuffle(pictures, 2))
        for block in self.blocks:
            hidden = block(hidden)
        return F.silu(self.neck(hidden.flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of any size -> [n, A]."""
        return self.head(self.describe(pictures))


class StartNetwork(PictureNetwork):
    """Pictures [n, 3, H, W] in [-1, 1] -> latents [n, d]."""

    scale: Tensor  # []
    spread: (
        Tensor  # [r, d] how latents move when a person differs by one std in what the network reads
    )
    centre: Tensor  # [F] mean features of pictures of people, if it was measured
    whiten: Tensor  # [F, F] by which features less their mean become uncorrelated, of std 1
    known: Tensor  # [3, V] what its vision model makes of patterns, if it has a sight
    usual: Tensor  # [2, V] mean and std of what that sees in pictures of people

    def __init__(
        self,
        latent_size: int,
        *,
        rank: int = 0,
        size: int = 32,
        width: int = 32,
        features: int = 128,
        locator: Mapping[str, int] | None = None,
        measured: bool = False,
        hides: bool = False,
        verdict: Mapping[str, Any] | None = None,
        sight: Sight | None = None,
    ) -> None:
        super().__init__(latent_size, size=size, width=width, features=features)
        self.latent_size = latent_size
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("spread", torch.zeros(rank, latent_size))
        self.locator = None if locator is None else PictureNetwork(PLACE + 1, **locator)
        self.measured, self.hides = measured, hides
        self.verdict = None if verdict is None else dict(verdict)  # as `inversion.verdict` reads it
        if measured:
            self.register_buffer("centre", torch.zeros(features))
            self.register_buffer("whiten", torch.eye(features))
        self.sight = sight
        self._eye: Eye | None = None
        if sight is not None:  # no convolutions: a linear map of what is seen
            del self.stem, self.blocks
            self.neck = nn.Linear(sight.features, features)
            self.register_buffer("known", torch.zeros(PATTERNS, sight.features))
            middle, std = torch.zeros(sight.features), torch.ones(sight.features)
            self.register_buffer("usual", torch.stack([middle, std]))

    @property
    def config(self) -> dict[str, Any]:
        """What `build_start` needs to make this architecture again."""
        found: dict[str, Any] = {
            "latent_size": self.latent_size, "rank": len(self.spread), **self.sizes
        }  # fmt: skip
        if self.locator is not None:
            found["locator"] = self.locator.sizes
        if self.measured:
            found["measured"] = True
        if self.hides:
            found["hides"] = True
        if self.verdict is not None:
            found["verdict"] = self.verdict
        if self.sight is not None:
            found["sight"] = self.sight.to_json()
        return found

    def seeing(self, vision: Vision | None) -> StartNetwork:
        """The same network, weights shared, with the vision model that it sees with; itself where it needs none.

        Raises ConfigError if that is missing or another one.
        """
        if self.sight is None:
            return self
        other = copy.copy(self)
        other._eye = Eye(self.sight, self.sight.require(vision, self.known))
        return other

    def describe(self, pictures: Tensor) -> Tensor:
        """Pictures of any size -> features [n, F]. Raises ShapeError for anything but [n, 3, H, W], and ConfigError
        where the vision model is missing."""
        if self.sight is None:
            return super().describe(pictures)
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ShapeError(
                f"A start network reads pictures [n, 3, H, W]. Got {list(pictures.shape)}."
            )
        eye = self._eye or Eye(self.sight, self.sight.require(None, self.known))
        middle, std = self.usual
        return self.neck((eye(pictures).to(self.usual) - middle) / std)

    @property
    def locates(self) -> bool:
        """Whether it says where people are."""
        return self.locator is not None

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [-1, 1] of any size -> latents [n, d]."""
        return self.answer(self.describe(pictures))

    def answer(self, features: Tensor) -> Tensor:
        """Features [n, F] -> latents [n, d]."""
        return self.head(features) * self.scale

    def strangeness(self, features: Tensor) -> Tensor:
        """How unlike pictures of people features [n, F] are: their Mahalanobis distance, about 1 for one [n]."""
        if not self.measured:
            raise ConfigError("This start network was not measured on pictures of people.")
        return ((features - self.centre) @ self.whiten).square().mean(1).sqrt()

    def locate(self, pictures: Tensor) -> Sighting:
        """Squares [B, 3, S, S] in [-1, 1] -> where the frame of the space's pictures lies, and how sure that is."""
        if self.locator is None:
            raise ConfigError("This start network was not taught to say where people are.")
        answer = self.locator(pictures)
        place, logit = answer.split([PLACE, 1], dim=1)
        low, high = (place.new_tensor(ends) for ends in (NEAREST, FARTHEST))
        return Sighting(torch.minimum(torch.maximum(place, low), high), logit[:, 0].sigmoid())


class HalvingBlock(nn.Module):
    """Two convolutions around a shortcut, then half the resolution: [B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1)
        self.norm_first = nn.GroupNorm(8, width_in)
        self.norm_second = nn.GroupNorm(8, width_out)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / 2, W / 2]."""
        inner = self.first(F.silu(self.norm_first(hidden)))
        inner = self.second(F.silu(self.norm_second(inner)))
        return F.avg_pool2d(self.shortcut(hidden) + inner, 2)


def build_start(config: Mapping[str, Any]) -> StartNetwork:
    """The network that a `config` describes. Raises ConfigError for one that it does not."""
    sizes = {key: int(config[key]) for key in ("latent_size", "rank", *_SIZES)}
    locator, verdict = config.get("locator"), config.get("verdict")
    sight = config.get("sight")
    for part, value in (("locator", locator), ("verdict", verdict), ("sight", sight)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"the {part} of a start network is described by names. Got {value!r}."
            )
    return StartNetwork(
        **sizes,
        locator=None if locator is None else {key: int(locator[key]) for key in _SIZES},
        measured=config.get("measured") is True,
        hides=config.get("hides") is True,
        verdict=verdict,
        sight=None if sight is None else Sight.from_json(sight),
    )
