"""Paint pictures with the avatar base, under classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.sampler import sample
from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...precision import quick_products
from .base import AvatarBase
from .vae import AvatarVae

GUIDANCE = 2.0  # the world's default, see benchmarks/results/world.json
STEPS = 12


@dataclass(frozen=True)
class Painter:
    """A base, the autoencoder of its latents, and how pictures are sampled."""

    base: AvatarBase
    vae: AvatarVae
    guidance: float = GUIDANCE
    steps: int = STEPS
    chunk: int = 128  # pictures that are sampled together

    def paint(
        self,
        words: Tensor,
        noise: Tensor,
        vectors: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Words [B, 4] from noise [B, 4, h, w] -> pictures [B, 3, 8h, 8w] in [-1, 1].

        With ``vectors`` [N, P], the batch is ordered by LoRA (B a multiple of N). The empty prompt is guided away from
        under the same LoRA, as in any graph of the host.
        """
        latents = self.latents(words, noise, vectors, layout)
        with torch.no_grad():
            return torch.cat([self.vae.decode(part) for part in latents.split(32)])

    @torch.no_grad()
    def latents(
        self,
        words: Tensor,
        noise: Tensor,
        vectors: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """As ``paint``, without the last step: latents [B, 4, h, w] of unit std."""
        return torch.cat(
            [
                self._sample(words[rows], noise[rows], some, layout)
                for rows, some in self._groups(len(words), vectors)
            ]
        )

    def _groups(self, count: int, vectors: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        people = count if vectors is None else len(vectors)
        each = count // people
        group = max(1, self.chunk // each)
        for start in range(0, people, group):
            rows = slice(start * each, (start + group) * each)
            yield rows, None if vectors is None else vectors[start : start + group]

    def _sample(
        self, words: Tensor, noise: Tensor, vectors: Tensor | None, layout: Layout | None
    ) -> Tensor:
        base, positive = self.base, self.base.prompt(words)
        negative = base.unconditional(len(words))

        def predict(latents: Tensor, times: Tensor) -> Tensor:
            # Two passes instead of one joint batch keep the rows ordered by LoRA.
            output = base(latents, times, positive).float()
            if self.guidance == 1:
                return output
            empty = base(latents, times, negative).float()
            return empty + self.guidance * (output - empty)

        with quick_products(), loras_applied(base.unet, layout, vectors):
            return sample(predict, noise, base.schedule, self.steps)
