"""The base as what a functional metric and a term on outputs take: a function, a schedule, pictures as it sees them."""

from __future__ import annotations

import torch

from ...lora.layout import Layout
from ..build.spaces import Model
from ..world.painter import noise_schedule
from ..world.renderer import render, sample_identities, sample_nuisance
from ..world.studio import Studio
from .inversion import AvatarDenoiser

PICTURES = 256


def model_of(studio: Studio, layout: Layout, *, pictures: int = PICTURES, seed: int = 0) -> Model:
    """A studio's base under the trigger prompt, with rendered pictures of people who are in no data set."""
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    people = sample_identities(pictures, generator=generator)
    shown = render(people, sample_nuisance(pictures, generator=generator))
    return Model(AvatarDenoiser(studio.base, layout), noise_schedule(studio.base), shown)
