"""Small files to try the nodes on: a portrait of somebody whom no space has seen, and LoRAs of a few others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...files.pictures import save_picture
from ...lora.write import save_lora
from ...training.dataset import VectorDataset
from .base import word_indices
from .renderer import matte, render
from .scene import WORDS, Scene, sample_scenes

LORAS = 8  # of the first held-out people
WHO = 31  # the portrait's person, by row among the held-out people
WORDS_OF_PORTRAIT = {"background": "blue", "smile": "smiling", "light": "front", "framing": "close"}


def write_portrait(dataset: VectorDataset, path: Path, *, seed: int = 31) -> None:
    """A picture in RGBA whose opacity is where the person is; same seed, same pose."""
    from PIL import Image

    held = dataset.heldout_rows
    if dataset.labels is None or len(held) <= WHO:
        raise DataError(f"The portrait shows held-out person {WHO}. There are {len(held)}.")
    person, scene = dataset.labels[held[WHO]][None], _scene(seed)
    colours = (render(person, scene)[0] + 1) / 2
    pixels = torch.cat([colours, matte(person, scene)[0]])
    array = (pixels * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    save_picture(Image.fromarray(np.ascontiguousarray(array)), path)


def write_loras(dataset: VectorDataset, folder: Path) -> list[Path]:
    """LoRAs of the first held-out people in kohya's spelling and half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, row in enumerate(dataset.heldout_rows[:LORAS].tolist(), 1):
        lora = dataset.layout.unpack(dataset.vectors(torch.tensor([row]))[0].half())
        path = folder / f"avatar-{i}.safetensors"
        save_lora(
            lora,
            path,
            format="kohya",
            alpha=dataset.layout.alpha,
            metadata={"w2wpp.base_model": dataset.layout.base_model, "w2wpp.licence": "Apache-2.0"},
        )
        written.append(path)
    return written


def _scene(seed: int) -> Scene:
    scene = sample_scenes(1, generator=torch.Generator().manual_seed(seed))
    words = word_indices(**WORDS_OF_PORTRAIT)
    return replace(scene, **{slot: words[i : i + 1] for i, slot in enumerate(WORDS)})
