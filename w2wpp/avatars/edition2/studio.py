"""A studio photographs LoRAs and reads the pictures back: the measuring instrument of every figure about the world."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lora.layout import Layout
from .base import AvatarBase, load_base
from .painter import GUIDANCE, STEPS, Painter
from .reader import AvatarReader, Reading, load_reader
from .scene import FRAMINGS, WORDS, poses
from .vae import AvatarVae, load_vae


@dataclass(frozen=True)
class Shots:
    """What a reader says of M pictures of each of N identities."""

    traits: Tensor  # [N, M, 20]
    obeyed: Tensor  # [N, M, 4] whether background, smile, light and framing are as the prompt asked
    pose: Tensor  # [N, M, 4] in stds of the framing that was asked for
    independent: Shots | None = (
        None  # the same pictures, as a reader that only ever scores sees them
    )

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
    """A painter's models, readers, and M scenes (a prompt and its noise) for each identity.

    The scenes of the i-th identity are the same in every studio of this seed, so that LoRAs of one person that
    came by different ways are compared under the same conditions.
    """

    base: AvatarBase
    vae: AvatarVae
    reader: AvatarReader
    judge: AvatarReader | None = None  # of another make; used for nothing but scores
    pictures: int = 4  # M
    seed: int = 77
    guidance: float = GUIDANCE
    steps: int = STEPS
    framing: str = ""  # of all pictures; without one it varies as the other words do

    def elsewhere(self) -> Studio:
        """The same studio with other scenes."""
        return replace(self, seed=self.seed + 1)

    def scenes(self, count: int, *, same: bool = False) -> tuple[Tensor, Tensor]:
        """Words [count * M, 4] and noise [count * M, 4, h, w]; with ``same``, everyone's are the first one's."""
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
        """Pictures [N * M, 3, H, W] of words [N * M, 4] with the LoRAs [N, P]."""
        painter = Painter(self.base, self.vae, self.guidance, self.steps)
        return painter.paint(words, noise, vectors, layout)

    @torch.no_grad()
    def read(self, pictures: Tensor, words: Tensor, count: int) -> Shots:
        """Read pictures [N * M, 3, H, W] that were asked to follow words [N * M, 4]; N is ``count``."""
        shots = _shots(self.reader, pictures, words, count)
        if self.judge is None:
            return shots
        return replace(shots, independent=_shots(self.judge, pictures, words, count))

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise [count, 4, h, w] to paint from."""
        config = self.base.config
        shape = (count, config.latent_channels, config.latent_size, config.latent_size)
        return torch.randn(shape, generator=generator)

    def _scene(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        drawn = [
            torch.randint(len(choices), (self.pictures,), generator=generator)
            for choices in WORDS.values()
        ]
        words, slot = torch.stack(drawn, dim=1), list(WORDS).index("framing")
        if self.framing:
            words[:, slot] = FRAMINGS.index(self.framing)
        return words, self.noise(self.pictures, generator)


def _shots(reader: AvatarReader, pictures: Tensor, words: Tensor, count: int) -> Shots:
    parts: list[Reading] = [reader.read(part) for part in pictures.split(128)]
    obeyed = torch.cat([p.obeyed(asked) for p, asked in zip(parts, words.split(128))])
    framing = words[:, list(WORDS).index("framing")]
    pose = poses(torch.cat([p.placement for p in parts]), framing)
    traits = torch.cat([p.traits for p in parts])
    return Shots(*(part.unflatten(0, (count, -1)) for part in (traits, obeyed, pose)))


def open_studio(models: Path, **options: Any) -> Studio:
    """A studio with the models of a folder, such as models/; ``options`` are fields of ``Studio``."""
    return Studio(
        load_base(models / "avatar-base.safetensors"),
        load_vae(models / "avatar-vae.safetensors"),
        load_reader(models / "avatar-reader.safetensors"),
        load_reader(models / "avatar-judge.safetensors"),
        **options,
    )
