"""The pictures with captions that `14 Make a space of my pictures` learns from, drawn anew.

    PYTHONPATH=. python benchmarks/example_people.py

Eight avatars from a seed, whom no shipped space has seen, before every background, with every expression and light.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from w2wpp.avatars.world.renderer import (
    BACKGROUNDS,
    LIGHTS,
    SMILES,
    Nuisance,
    render,
    sample_identities,
    sample_nuisance,
)

NAMES = ("ada", "ben", "chloe", "dora", "eva", "fay", "gus", "hana")
PICTURES = 8  # of each
FOLDER = Path(__file__).parents[1] / "example_workflows" / "people"


def scenes(generator: torch.Generator) -> Nuisance:
    """Every background once, and expressions and lights in turn, shuffled."""
    drawn = sample_nuisance(PICTURES, generator=generator)
    words = [
        torch.randperm(PICTURES, generator=generator) % len(known)
        for known in (BACKGROUNDS, SMILES, LIGHTS)
    ]
    return Nuisance(*words, drawn.pose, drawn.jitter)


def main() -> None:
    generator = torch.Generator().manual_seed(20)
    for name, identity in zip(NAMES, sample_identities(len(NAMES), generator=generator)):
        own, around = FOLDER / name, scenes(generator)
        own.mkdir(parents=True, exist_ok=True)
        pictures = render(identity.expand(PICTURES, -1), around)
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1)
        said = around.words().tolist()
        for i, (picture, (background, smile, light)) in enumerate(zip(pixels, said), 1):
            Image.fromarray(picture.numpy()).save(own / f"{i}.png", optimize=True)
            words = f"{SMILES[smile]}, {BACKGROUNDS[background]} background, light from the {LIGHTS[light]}\n"
            (own / f"{i}.txt").write_text(words, encoding="utf-8")


if __name__ == "__main__":
    main()
