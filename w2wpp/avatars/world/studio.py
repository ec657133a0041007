"""A studio photographs LoRAs and reads the pictures back: the measuring instrument of every figure about the world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lora.layout import Layout
from .base import AvatarBase, load_base
from .embedder import AvatarEmbedder, load_embedder
from .painter import GUIDANCE, STEPS, paint
from .renderer import BACKGROUNDS, IMAGE_SIZE, LIGHTS, SMILES


@dataclass(frozen=True)
class Shots:
    """What the embedder reads from M pictures of each of N identities."""

    traits: Tensor  # [N, M, 20]
    obeyed: Tensor  # [N, M, 3] whether background, smile and light are as the prompt asked
    pose: Tensor  # [N, M, 4]

    @property
    def embeddings(self) -> Tensor:
        """Unit identity vectors [N, M, 20]."""
        return F.normalize(self.traits, dim=-1)

    @property
    def faces(self) -> Tensor:
        """One unit identity vector per identity, over all its pictures: [N, 20]."""
        return F.normalize(self.traits.mean(1), dim=-1)

    def prompt_adherence(self) -> Tensor:
        """Share of obeyed words of each identity [N]."""
        return self.obeyed.float().mean((1, 2))


@dataclass(frozen=True)
class Studio:
    """A base, an embedder, and M scenes (a prompt and its noise) for each identity.

    The scenes of the i-th identity are the same in every studio of this seed, so that LoRAs of one person that
    came by different ways are compared under the same conditions.
    """

    base: AvatarBase
    embedder: AvatarEmbedder
    pictures: int = 4  # M
    seed: int = 77
    guidance: float = GUIDANCE
    steps: int = STEPS

    def scenes(self, count: int, *, same: bool = False) -> tuple[Tensor, Tensor]:
        """Words [count * M, 3] and noise [count * M, 3, H, W]; with ``same``, everyone's are the first one's."""
        drawn = [self._scene(0 if same else i) for i in range(count)]
        return torch.cat([words for words, _ in drawn]), torch.cat([noise for _, noise in drawn])

    def photograph(self, vectors: Tensor, layout: Layout, *, same: bool = False) -> Shots:
        """M pictures of each LoRA [N, P]."""
        words, noise = self.scenes(len(vectors), same=same)
        return self.read(self.paint(words, noise, vectors, layout), words, len(vectors))

    def photograph_nobody(self, count: int) -> Shots:
        """M pictures without a LoRA, ``count`` times."""
        words, noise = self.scenes(count)
        return self.read(self.paint(words, noise), words, count)

    def paint(
        self,
        words: Tensor,
        noise: Tensor,
        vectors: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Pictures [N * M, 3, H, W] of words [N * M, 3] with the LoRAs [N, P]."""
        return paint(
            self.base,
            words,
            noise,
            layout=layout,
            vectors=vectors,
            guidance=self.guidance,
            steps=self.steps,
        )

    @torch.no_grad()
    def read(self, pictures: Tensor, words: Tensor, count: int) -> Shots:
        """Read pictures [N * M, 3, H, W] that were asked to follow words [N * M, 3]; N is ``count``."""
        parts = [self.embedder.read(part) for part in pictures.split(256)]
        answers = [
            torch.cat([logits[slot].argmax(1) for _, logits, _ in parts]) for slot in range(3)
        ]
        obeyed = torch.stack(answers, dim=1) == words
        traits = torch.cat([traits for traits, _, _ in parts])
        pose = torch.cat([pose for _, _, pose in parts])
        return Shots(*(part.unflatten(0, (count, -1)) for part in (traits, obeyed, pose)))

    def _scene(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        sizes = (len(BACKGROUNDS), len(SMILES), len(LIGHTS))
        drawn = [torch.randint(size, (self.pictures,), generator=generator) for size in sizes]
        shape = (self.pictures, 3, IMAGE_SIZE, IMAGE_SIZE)
        return torch.stack(drawn, dim=1), torch.randn(shape, generator=generator)


def open_studio(
    base: Path, embedder: Path, *, device: torch.device | str = "cpu", **options: Any
) -> Studio:
    """A studio with the models of two files, which compute on the device; ``options`` are fields of ``Studio``.

    What it takes and gives is on the CPU all the same.
    """
    return Studio(load_base(base).to(device), load_embedder(embedder).to(device), **options)
