"""Paint pictures with the avatar base: classifier-free guidance and DPM-Solver++ (Lu et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from .base import AvatarBase

GUIDANCE = 2.0  # the world's default, see benchmarks/results/world.json
STEPS = 12


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
    schedule = base.config.schedule
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=schedule["steps"],
        beta_start=schedule["beta_start"],
        beta_end=schedule["beta_end"],
        beta_schedule=schedule["kind"],
        prediction_type=base.config.prediction,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    positive, negative = base.prompt(words), base.unconditional(len(words))
    picture = noise
    # bf16 is the fast path of CPUs with matrix units; errors stay far below the pictures' 8 bits.
    with torch.autocast("cpu", torch.bfloat16):
        for timestep in scheduler.timesteps:
            times = timestep.expand(len(words))
            # Two passes instead of one joint batch keep the rows ordered by LoRA.
            with loras_applied(base.unet, layout, vectors):
                output = base(picture, times, positive).float()
                if guidance != 1:
                    empty = base(picture, times, negative).float()
                    output = empty + guidance * (output - empty)
            picture = scheduler.step(output, timestep, picture).prev_sample
    return picture.clamp(-1, 1)
