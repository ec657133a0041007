"""Reads a picture back: whose face it is and what the photograph adds.

The identity read from a picture, as a unit vector, gives the **ID score**: the cosine between two of them. The
words (background, smile, light) tell whether a picture obeys its prompt. Trained on rendered pictures alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...files.container import open_container, write_container
from .renderer import BACKGROUNDS, LIGHTS, SMILES, TRAITS

FORMAT = "w2wpp.avatar_embedder"
WORD_COUNTS = (len(BACKGROUNDS), len(SMILES), len(LIGHTS))
POSE_SIZE = 4  # shift right, shift down, log scale, rotation


class AvatarEmbedder(nn.Module):
    """A small residual CNN with a head for each question. Pictures come from any device, and answers go back there."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.width = width
        # Folding 2x2 pixels into channels loses nothing and spares the costly full resolution.
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList([_Block(width, 2 * width), _Block(2 * width, 3 * width)])
        # The last map keeps its 4x4 positions: where a feature sits is part of who it is.
        features = 3 * width * 16
        self.neck = nn.Sequential(nn.Linear(features, 256), nn.SiLU())
        self.identity_head = nn.Linear(256, len(TRAITS))
        self.word_head = nn.Linear(256, sum(WORD_COUNTS))
        self.pose_head = nn.Linear(256, POSE_SIZE)

    def _features(self, pictures: Tensor) -> Tensor:
        hidden = self.stem(F.pixel_unshuffle(pictures.to(self.stem.weight.device), 2))
        for block in self.blocks:
            hidden = block(hidden)
        return self.neck(hidden.flatten(1))

    def read(self, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Pictures [B, 3, 32, 32] in [-1, 1] -> identity [B, 20], logits of each word [B, words], pose [B, 4]."""
        features = self._features(pictures)
        words = self.word_head(features).to(pictures.device)
        identity, pose = (head(features) for head in (self.identity_head, self.pose_head))
        return (
            identity.to(pictures.device),
            words.split(WORD_COUNTS, dim=1),
            pose.to(pictures.device),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 32, 32] in [-1, 1] -> unit identity vectors [B, 20]."""
        return F.normalize(self.identity_head(self._features(pictures)), dim=1).to(pictures.device)


class _Block(nn.Module):
    """Two convolutions around a shortcut, then half the resolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1)
        self.norm_first = nn.GroupNorm(8, width_in)
        self.norm_second = nn.GroupNorm(8, width_out)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(F.silu(self.norm_first(hidden)))
        inner = self.second(F.silu(self.norm_second(inner)))
        return F.avg_pool2d(self.shortcut(hidden) + inner, 2)


def save_embedder(
    embedder: AvatarEmbedder, path: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write the embedder in half precision."""
    tensors = {name: value.detach().half() for name, value in embedder.state_dict().items()}
    config = {"width": embedder.width, "provenance": dict(provenance or {})}
    write_container(path, tensors, format=FORMAT, config=config)


def load_embedder(path: str | Path) -> AvatarEmbedder:
    """Read an embedder written by ``save_embedder``, frozen and in evaluation mode."""
    file = open_container(path, FORMAT)
    embedder = AvatarEmbedder(int(file.config["width"]))
    for name, value in embedder.state_dict().items():
        file.require(name, tuple(value.shape), torch.float16)
        value.copy_(file.read(name))
    return embedder.requires_grad_(False).eval()
