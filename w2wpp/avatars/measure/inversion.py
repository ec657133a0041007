"""Inversion in the miniature world: one picture of a person in, a LoRA out, and how good it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...basis import AffineBasis
from ...codecs import build_codec
from ...errors import ConfigError
from ...identity import Identity
from ...inversion import Denoise, NoiseSchedule, Objective, Recipe, Solution, invert
from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...space import Space
from ..world.base import AvatarBase
from ..world.renderer import render, sample_nuisance

PORTRAIT_SEED = 9_000  # of the pictures that are inverted


def denoiser(base: AvatarBase, layout: Layout, words: Tensor | None = None) -> Denoise:
    """The avatar base under the trigger prompt, or under words [3] that describe the picture."""
    prompt = base.prompt(torch.full((1, 3), -1) if words is None else words[None])

    def denoise(noisy: Tensor, timestep: Tensor, vectors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), loras_applied(base.unet, layout, vectors):
            return base(noisy, timestep, prompt.expand(len(noisy), -1, -1))

    return denoise


def schedule(base: AvatarBase) -> NoiseSchedule:
    return NoiseSchedule(base.alphas_cumprod, base.config.prediction)


def portraits(identity: Tensor, rows: Tensor) -> Tensor:
    """The one picture there is of each person [N, 3, 32, 32]: identity [N, 20], rows [N] number the people."""
    shots = []
    for person, row in zip(identity, rows.tolist()):
        generator = torch.Generator().manual_seed(PORTRAIT_SEED + row)
        shots.append(render(person[None], sample_nuisance(1, generator=generator)))
    return torch.cat(shots)


def invert_pictures(
    base: AvatarBase,
    space: Space,
    pictures: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    **options: Any,
) -> Solution:
    """Pictures [B, 3, 32, 32] of as many people, side by side."""
    start = start_of(space, pictures, recipe.start)
    if start is not None and recipe.steps == 0:
        return Solution(start, [], 0, "the start itself", [], 0.0)
    objective = Objective(
        space,
        pictures[:, None],
        denoiser(base, space.layout),
        schedule(base),
        seed=seed,
        **recipe.objective,
    )
    return invert(
        objective,
        recipe.optimiser,
        steps=recipe.steps,
        start=start,
        pivotal=recipe.pivotal,
        seed=seed,
        **{"keep": recipe.keep, **options},
    )


def start_of(space: Space, pictures: Tensor, kind: str) -> Identity | None:
    """Where an inversion starts; none is the mean person of the space."""
    if kind == "mean" or (kind == "amortised" and space.start is None):
        return None
    if kind != "amortised":
        raise ConfigError(f"An inversion starts at 'amortised' or 'mean'. Got {kind!r}.")
    return space.start_from(pictures)


def weight_space(layout: Layout, mean: Tensor, std: Tensor) -> Space:
    """No space at all, as a space: every weight its own coordinate, in deviations [P] from the mean LoRA [P]."""
    sizes = {"coefficient_size": layout.size, "latent_size": layout.size}
    codec = build_codec({"name": "pca", **sizes})
    # A weight that never varied may not move; its neighbours' smallest deviation does no harm either.
    std = std.clamp_min(1e-3 * float(std.mean()))
    return Space(layout, AffineBasis(layout.size), codec, mean, std, {"name": "weights"})
