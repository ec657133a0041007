"""The main job on what ships: new identities, a walk between two of them, their LoRAs, and the pictures of it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...export import export_lora
from ...files.pictures import save_picture
from ...identity import interpolate, load_identity, save_identity
from ...metrics import consistency, likeness_between
from ...spacefile import load_space
from ..world.base import word_indices
from ..world.renderer import IMAGE_SIZE
from ..world.studio import Studio, open_studio
from .portrait import invert_file, read_picture
from .sheets import Strip, save_sheet, to_pil

PEOPLE, STEPS = 8, 8
# From person by person to scene by scene, so that a column of the sheet is a person.
ACROSS = "(people scenes) c h w -> (scenes people) c h w"
SCENES = (
    ("white", "neutral", "front"), ("blue", "smiling", "left"), ("sunset", "serious", "right"),
    ("checks", "smiling", "front"),
)  # fmt: skip


def make_demo(
    folder: Path,
    *,
    models: Path,
    seed: int = 7,
    truncation: float = 0.9,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Write pictures, identities, LoRAs and a contact sheet into ``folder``; returns what was made and measured.

    The base and the embedder compute on the device.
    """
    space = load_space(models / "avatars.safetensors")
    studio = open_studio(
        models / "avatar-base.safetensors",
        models / "avatar-embedder.safetensors",
        device=device,
    )
    people = space.sample(
        PEOPLE, generator=torch.Generator().manual_seed(seed), truncation=truncation
    )
    vectors = people.vectors(space)
    walk = interpolate(people[0], people[1], steps=STEPS)

    folder.mkdir(parents=True, exist_ok=True)
    save_identity(people, folder / "people.safetensors")
    save_identity(walk, folder / "walk.safetensors")
    for i, person in enumerate(people):
        export_lora(person, space, folder / f"person-{i}.safetensors")

    found = invert_file(
        models / "avatars.safetensors",
        models.parent / "example_workflows" / "avatar_portrait.png",
        folder / "inverted.safetensors",
        base_path=models / "avatar-base.safetensors",
        method="adam",
        device=device,
    )
    portrait = read_picture(models.parent / "example_workflows" / "avatar_portrait.png")
    inverted = load_identity(folder / "inverted.safetensors")

    scenes = torch.stack([word_indices(*scene) for scene in SCENES])
    portraits = _paint(studio, space.layout, vectors, scenes, seed)
    again = _paint(studio, space.layout, inverted.vectors(space), scenes, seed)
    steps = _paint(studio, space.layout, walk.vectors(space), scenes[:2], seed)
    for i, picture in enumerate(portraits[:: len(SCENES)]):
        save_picture(to_pil(picture).resize((256, 256)), folder / f"person-{i}.png")
    sheet = [
        Strip(
            f"{PEOPLE} people who do not exist, each in {len(SCENES)} scenes",
            rearrange(portraits, ACROSS, people=PEOPLE),
            PEOPLE,
        ),
        Strip(
            "One picture (left), and the person found in it, in other scenes",
            torch.cat([portrait, again]),
            1 + len(SCENES),
        ),
        Strip(
            f"A walk from the first to the second, in {STEPS} steps",
            rearrange(steps, ACROSS, people=STEPS),
            STEPS,
        ),
    ]
    save_sheet(sheet, folder / "contact-sheet.png")

    shots = studio.read(portraits, scenes.repeat(PEOPLE, 1), PEOPLE)
    return {
        "folder": str(folder),
        "space": space.name,
        "people": PEOPLE,
        "consistency": consistency(shots.embeddings).mean().item(),
        "likeness_to_others": likeness_between(shots.embeddings).mean().item(),
        "inversion": found,
        "prompt_adherence": shots.prompt_adherence().mean().item(),
    }


def _paint(studio: Studio, layout: Any, vectors: Tensor, scenes: Tensor, seed: int) -> Tensor:
    """[N * scenes, 3, H, W]: every scene has one noise, the same for everyone."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    people = len(vectors)
    words, noises = scenes.repeat(people, 1), noise.repeat(people, 1, 1, 1)
    return studio.paint(words, noises, vectors, layout)
