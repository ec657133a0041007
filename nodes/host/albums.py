"""Pictures of people, from a folder with a folder for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ...w2wpp.errors import DataError, FormatError
from ...w2wpp.training.everyone import Person
from .pictures import picture_latents
from .places import PICTURES

MOST_PICTURES = 1000  # of one person


def people_in(folder: Path, title: str) -> dict[str, list[Path]]:
    """{person: their picture files}, in the order of their names. Raises DataError where there are none."""
    found = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and not entry.name.startswith("."):
            pictures = pictures_in(entry)
            if pictures:
                found[entry.name] = pictures[:MOST_PICTURES]
    if not found:
        own = len(pictures_in(folder)) if folder.is_dir() else 0
        there = f"it holds {own} pictures itself" if own else "there are none"
        raise DataError(
            f"{title} should hold a folder of pictures for every person, called as the person is; {there}. Endings "
            f"that count are {', '.join(PICTURES)}."
        )
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The picture files right in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file())


def person_of(
    name: str,
    files: list[Path],
    model: Any,
    vae: Any,
    pixels: int,
    captions: Sequence[str] = (),
    prompts: Callable[[Sequence[str]], Sequence[Any]] | None = None,
) -> Person:
    """Somebody to train, whose pictures are read when their turn comes.

    ``captions`` are the words of each picture, for pictures with prompts of their own, which ``prompts`` makes of them.
    """

    def pictures() -> torch.Tensor:
        square = torch.stack([square_picture(path, pixels) for path in files])
        return picture_latents(model, vae, square, None, pixels)[0]

    if prompts is None:
        return Person(name, _fingerprint(files), pictures)
    key = hashlib.sha256("\0".join([_fingerprint(files), *captions]).encode()).hexdigest()
    return Person(name, key, pictures, lambda: prompts(captions))


def square_picture(path: Path, pixels: int) -> torch.Tensor:
    """The middle of a picture file, [pixels, pixels, 3] in [0, 1], the right way up."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
            fitted = ImageOps.fit(picture, (pixels, pixels), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise FormatError(
            f"{path.parent.name}/{path.name} can't be read as a picture: {e}. Take it out of the folder."
        ) from e
    return torch.from_numpy(np.asarray(fitted).copy()).float() / 255


def _fingerprint(files: list[Path]) -> str:
    """Changes with the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode("utf-8", "surrogatepass"))
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
