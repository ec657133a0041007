"""Paint pictures with the avatar base, under classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...diffusion.sampler import sample
from ...diffusion.schedule import NoiseSchedule
from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...precision import quick_products
from .base import AvatarBase

GUIDANCE = 2.0  # the world's default, see benchmarks/results/world.json
STEPS = 12


def noise_schedule(base: AvatarBase) -> NoiseSchedule:
    """The schedule that the base was trained with."""
    return NoiseSchedule(base.alphas_cumprod, base.config.prediction)


@torch.no_grad()
def paint(
    base: AvatarBase,
    words: Tensor,
    noise: Tensor,
    *,
    layout: Layout | None = None,
    vectors: Tensor | None = None,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    chunk: int = 128,
) -> Tensor:
    """Paint words [B, 3] from noise [B, 3, 32, 32] -> pictures [B, 3, 32, 32] in [-1, 1].

    With ``vectors`` [N, P], the batch is ordered by LoRA (B a multiple of N). The empty prompt is guided away from
    under the same LoRA, as in any graph of the host.
    """
    count = len(words) if vectors is None else len(vectors)
    per_lora = len(words) // count
    group = max(1, chunk // per_lora)
    pictures = []
    for start in range(0, count, group):
        rows = slice(start * per_lora, (start + group) * per_lora)
        some = None if vectors is None else vectors[start : start + group]
        pictures.append(_paint(base, words[rows], noise[rows], layout, some, guidance, steps))
    return torch.cat(pictures)


def _paint(
    base: AvatarBase,
    words: Tensor,
    noise: Tensor,
    layout: Layout | None,
    vectors: Tensor | None,
    guidance: float,
    steps: int,
) -> Tensor:
    positive, negative = base.prompt(words), base.unconditional(len(words))

    def predict(picture: Tensor, times: Tensor) -> Tensor:
        # Two passes instead of one joint batch keep the rows ordered by LoRA.
        output = base(picture, times, positive).float()
        if guidance == 1:
            return output
        empty = base(picture, times, negative).float()
        return empty + guidance * (output - empty)

    with quick_products(), loras_applied(base.unet, layout, vectors):
        return sample(predict, noise, noise_schedule(base), steps).clamp(-1, 1)
