"""Inversion in the miniature world: one picture of a person in, a LoRA out, and how good it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...basis import AffineBasis
from ...codecs import build_codec
from ...inversion import Callback, Recipe, Solution, session
from ...inversion.checkpoint import digest
from ...lora.hooks import loras_applied
from ...lora.layout import Layout
from ...precision import quick_products
from ...space import Space
from ..world.base import AvatarBase
from ..world.painter import noise_schedule
from ..world.renderer import render, sample_nuisance

PORTRAIT_SEED = 9_000  # of the pictures that are inverted


class AvatarDenoiser:
    """The avatar base as inversion sees it, under the trigger prompt or words [3] that describe the picture."""

    def __init__(self, base: AvatarBase, layout: Layout, words: Tensor | None = None) -> None:
        self.base, self.layout = base, layout
        self.prompt = base.prompt(torch.full((1, 3), -1) if words is None else words[None])

    def __call__(self, noisy: Tensor, timestep: Tensor, vectors: Tensor) -> Tensor:
        loras = loras_applied(self.base.unet, self.layout, vectors)
        with quick_products(), loras:
            return self.base(noisy, timestep, self.prompt.expand(len(noisy), -1, -1))

    @property
    def fingerprint(self) -> str:
        """Of the base's weights and the prompt: checkpoints of inversions name their model by it."""
        return digest({}, {**self.base.state_dict(), "prompt": self.prompt})


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
    how: str | Recipe,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
) -> Solution:
    """One picture each of B people [B, 3, 32, 32], side by side, by a method or a recipe."""
    shown = pictures[:, None]
    made = session(space, shown, how, faces=shown, mask=mask, seed=seed)
    return made.solve(
        AvatarDenoiser(base, space.layout),
        noise_schedule(base),
        callback=callback,
        checkpoint=checkpoint,
    )


def weight_space(layout: Layout, mean: Tensor, std: Tensor) -> Space:
    """No space at all, as a space: every weight its own coordinate, in stds [P] from the mean LoRA [P]."""
    sizes = {"coefficient_size": layout.size, "latent_size": layout.size}
    codec = build_codec({"name": "pca", **sizes})
    # A weight that never varied may not move; its neighbours' smallest std does no harm either.
    std = std.clamp_min(1e-3 * float(std.mean()))
    return Space(layout, AffineBasis(layout.size), codec, mean, std, {"name": "weights"})
