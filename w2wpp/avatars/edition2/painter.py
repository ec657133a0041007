"""Paint pictures with the avatar base: classifier-free guidance and DPM-Solver++ (Lu et al. 2022) on latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from .base import AvatarBase
from .vae import AvatarVae

GUIDANCE = 2.0
STEPS = 12


@dataclass(frozen=True)
class Painter:
    """A base, the autoencoder of its latents, and how pictures are sampled."""

    base: AvatarBase
    vae: AvatarVae
    layout: Layout
    guidance: float = GUIDANCE
    steps: int = STEPS
    chunk: int = 128  # pictures that are sampled together

    def paint(self, words: Tensor, noise: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Words [B, 4] from noise [B, 4, h, w] -> pictures [B, 3, 8h, 8w] in [-1, 1].

        With ``vectors`` [N, P], the batch is ordered by LoRA (B a multiple of N). The empty prompt is guided away from
        under the same LoRA, as in any graph of the host.
        """
        latents = self.latents(words, noise, vectors)
        with torch.no_grad():
            return torch.cat([self.vae.decode(part) for part in latents.split(32)])

    @torch.no_grad()
    def latents(self, words: Tensor, noise: Tensor, vectors: Tensor | None = None) -> Tensor:
        """As ``paint``, without the last step: latents [B, 4, h, w] of unit std."""
        return torch.cat(
            [
                self._sample(words[rows], noise[rows], some)
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

    def _sample(self, words: Tensor, noise: Tensor, vectors: Tensor | None) -> Tensor:
        schedule = self.base.config.schedule
        scheduler: Any = DPMSolverMultistepScheduler(
            num_train_timesteps=schedule["steps"],
            beta_start=schedule["beta_start"],
            beta_end=schedule["beta_end"],
            beta_schedule=schedule["kind"],
            prediction_type=self.base.config.prediction,
            timestep_spacing="linspace",
        )
        scheduler.set_timesteps(self.steps)
        positive, negative = self.base.prompt(words), self.base.unconditional(len(words))
        sample = noise
        # bf16 is the fast path of CPUs with matrix units; errors stay far below the pictures' 8 bits.
        with torch.autocast("cpu", torch.bfloat16):
            for timestep in scheduler.timesteps:
                times = timestep.expand(len(words))
                # Two passes instead of one joint batch keep the rows ordered by LoRA.
                with loras_applied(self.base.unet, self.layout, vectors):
                    output = self.base(sample, times, positive).float()
                    if self.guidance != 1:
                        empty = self.base(sample, times, negative).float()
                        output = empty + self.guidance * (output - empty)
                sample = scheduler.step(output, timestep, sample).prev_sample
        return sample
