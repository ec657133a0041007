"""A studio photographs LoRAs and reads the pictures back: the measuring instrument of every figure about the world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Layout
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

    def obedience(self) -> Tensor:
        """Share of obeyed words of each identity [N]."""
        return self.obeyed.float().mean((1, 2))


@dataclass(frozen=True)
class Studio:
    """A base, an embedder and M prompts with their noise, the same for everyone who is photographed."""

    base: AvatarBase
    embedder: AvatarEmbedder
    words: Tensor  # [M, 3]
    noise: Tensor  # [M, 3, H, W]
    guidance: float = GUIDANCE
    steps: int = STEPS

    def photograph(self, vectors: Tensor, layout: Layout) -> Shots:
        """M pictures of each LoRA [N, P]."""
        return self.read(self.paint(vectors, layout))

    def paint(
        self, vectors: Tensor | None, layout: Layout | None, people: int | None = None
    ) -> Tensor:
        """Pictures [N * M, 3, H, W]; without vectors, the plain base ``people`` times (with noise of its own)."""
        count = len(vectors) if vectors is not None else people or 1
        words, noise = self.words.repeat(count, 1), self.noise.repeat(count, 1, 1, 1)
        if vectors is None:
            noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(count))
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
    def read(self, pictures: Tensor) -> Shots:
        """Read pictures [N * M, 3, H, W] that follow the studio's prompts."""
        parts = [self.embedder.read(part) for part in pictures.split(256)]
        count = len(pictures) // len(self.words)
        traits, pose = (
            torch.cat([part[i] for part in parts]).unflatten(0, (count, -1)) for i in (0, 2)
        )
        answers = [torch.cat([part[1][slot].argmax(1) for part in parts]) for slot in range(3)]
        obeyed = torch.stack(answers, dim=1).unflatten(0, (count, -1)) == self.words
        return Shots(traits, obeyed, pose)


def open_studio(
    base_path: Path,
    embedder_path: Path,
    *,
    pictures: int = 4,
    seed: int = 77,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
) -> Studio:
    """A studio with ``pictures`` random prompts."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(BACKGROUNDS), len(SMILES), len(LIGHTS))
    words = torch.stack(
        [torch.randint(size, (pictures,), generator=generator) for size in sizes], dim=1
    )
    noise = torch.randn(pictures, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Studio(load_base(base_path), load_embedder(embedder_path), words, noise, guidance, steps)
