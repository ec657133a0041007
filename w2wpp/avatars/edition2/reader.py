"""Reads a picture back: where the face is, whose it is, and which words of the prompt the picture obeys.

Three questions, three networks: a locator finds the face in the whole picture, looks once more at what it found and
answers what a whole picture shows (background, framing); a face network reads identity, smile and light from the face
brought into one frame. The identity read, as a unit vector, gives the **ID score**: the cosine between two of them.

Two readers of different make exist, so that what one of them was used for can be scored by the other: ``conv`` is the
project's own (starts, calibration, training signals), ``mixer`` only ever scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...files.container import open_container, write_container
from ...start_network import HalvingBlock
from .framing import compose, crop
from .scene import TRAITS, WORDS

FORMAT = "w2wpp.avatar_reader"
LOOK_SIZE = 64  # pixels per side that the locator and the face network see
PLACEMENT = 4
SECOND_LOOK = (
    1.9  # half side of the second look's window in face units: room for an error of the first
)
_WHOLE = ("background", "framing")
_FACE = ("smile", "light")


@dataclass(frozen=True)
class Reading:
    """What a reader says of B pictures."""

    traits: Tensor  # [B, 20]
    words: dict[str, Tensor]  # logits [B, choices] by slot
    placement: Tensor  # [B, 4] see ``framing``
    present: Tensor  # [B] logit of there being a face

    @property
    def identity(self) -> Tensor:
        """Unit identity vectors [B, 20]."""
        return F.normalize(self.traits, dim=1)

    def obeyed(self, words: Tensor) -> Tensor:
        """[B, 4] whether background, smile, light and framing are as ``words`` [B, 4] asked."""
        answers = [self.words[slot].argmax(1) for slot in WORDS]
        return torch.stack(answers, dim=1) == words


class AvatarReader(nn.Module):
    """Locator and face network of one make; ``read`` joins them."""

    def __init__(self, make: str = "conv", width: int = 48) -> None:
        super().__init__()
        if make not in BACKBONES:
            raise ConfigError(f"Unknown make of reader {make!r}: expected {', '.join(BACKBONES)}")
        self.make, self.width = make, width
        backbone = BACKBONES[make]
        self.locator = _Heads(
            backbone(width), place=PLACEMENT, present=1, **{s: len(WORDS[s]) for s in _WHOLE}
        )
        self.face = _Heads(backbone(width), traits=len(TRAITS), **{s: len(WORDS[s]) for s in _FACE})

    def locate(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures [B, 3, S, S] in [-1, 1] -> placement [B, 4] after two looks, and the first look's answers."""
        first = self.locator(_look(pictures))
        placement = _bounded(first["place"])
        again = self.locator(crop(pictures, placement, LOOK_SIZE, window=SECOND_LOOK))
        return compose(placement, _window(SECOND_LOOK, _bounded(again["place"]))), first

    def read(self, pictures: Tensor) -> Reading:
        """Pictures [B, 3, S, S] in [-1, 1], squares of any size."""
        placement, whole = self.locate(pictures)
        face = self.face(crop(pictures, placement, LOOK_SIZE))
        words = {s: (whole if s in _WHOLE else face)[s] for s in WORDS}
        return Reading(face["traits"], words, placement, whole["present"][:, 0])

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> unit identity vectors [B, 20]."""
        return self.read(pictures).identity


def _look(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, size=(LOOK_SIZE, LOOK_SIZE), mode="area")


def _bounded(place: Tensor) -> Tensor:
    """Keep an answer of the locator where crops make sense: in the picture, scale 1/6 to 2.7, turned by 1 at most."""
    limit = place.new_tensor([1.5, 1.5, 1.0, 1.0])
    low = place.new_tensor([-1.5, -1.5, -1.8, -1.0])
    return torch.minimum(torch.maximum(place, low), limit)


def _window(window: float, place: Tensor) -> Tensor:
    """A placement in a crop's half frames -> the same in the coordinates that the crop was cut in."""
    log = place.new_tensor(window).log()
    return torch.cat([place[:, :2] * window, place[:, 2:3] + log, place[:, 3:]], dim=1)


class _Heads(nn.Module):
    """A backbone and a linear answer to each question."""

    def __init__(self, backbone: nn.Module, **sizes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({name: nn.LazyLinear(size) for name, size in sizes.items()})
        with torch.no_grad():
            self(torch.zeros(1, 3, LOOK_SIZE, LOOK_SIZE))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.backbone(pictures)
        return {name: head(features) for name, head in self.heads.items()}


class _Conv(nn.Module):
    """A small residual CNN; its last map keeps its 4x4 positions, for where a feature sits is part of who it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(48, width, 3, padding=1)
        widths = [width, 2 * width, 3 * width]
        self.blocks = nn.ModuleList([HalvingBlock(a, b) for a, b in pairwise(widths)])
        self.neck = nn.Sequential(nn.Linear(widths[-1] * 16, 256), nn.SiLU())

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.stem(F.pixel_unshuffle(pictures, 4))
        for block in self.blocks:
            hidden = block(hidden)
        return self.neck(hidden.flatten(1))


class _Mixer(nn.Module):
    """An MLP-Mixer on 8x8 patches (Tolstikhin et al. 2021): every place has weights of its own."""

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        tokens, channels = (LOOK_SIZE // 8) ** 2, 4 * width
        self.patch = nn.Linear(3 * 64, channels)
        self.blocks = nn.ModuleList([_Mix(tokens, channels) for _ in range(depth)])
        self.norm = nn.LayerNorm(channels)
        self.neck = nn.Sequential(nn.Linear(tokens * 16, 256), nn.SiLU())
        self.narrow = nn.Linear(channels, 16)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.patch(F.pixel_unshuffle(pictures, 8).flatten(2).transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        return self.neck(self.narrow(self.norm(hidden)).flatten(1))


class _Mix(nn.Module):
    """One MLP across tokens, one across channels."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.tokens(self.norm_tokens(hidden).transpose(1, 2)).transpose(1, 2)
        return hidden + self.channels(self.norm_channels(hidden))


BACKBONES = {"conv": _Conv, "mixer": _Mixer}


def save_reader(
    reader: AvatarReader, path: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write the reader in half precision."""
    tensors = {name: value.detach().half() for name, value in reader.state_dict().items()}
    config = {"make": reader.make, "width": reader.width, "provenance": dict(provenance or {})}
    write_container(path, tensors, format=FORMAT, config=config)


def load_reader(path: str | Path) -> AvatarReader:
    """Read a reader written by ``save_reader``, in fp32, frozen and in evaluation mode."""
    file = open_container(path, FORMAT)
    reader = AvatarReader(str(file.config["make"]), int(file.config["width"]))
    for name, value in reader.state_dict().items():
        file.require(name, tuple(value.shape), torch.float16)
        value.copy_(file.read(name))
    return reader.requires_grad_(False).eval()
