"""Picture files for the command line; needs Pillow, which the host brings and outside of it an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FormatError
from .kinds import SEEN, kind_of_bytes
from .opened import OpenedFile
from .writing import replacing


def open_picture(path: Path, mode: str = "RGB") -> Any:
    """A picture file in RGB or RGBA, upright, as Pillow holds it. Raises FormatError for what is none."""
    from PIL import Image, ImageOps

    with OpenedFile(path) as opened:
        head = opened.read(0, SEEN)
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert(mode)
    except Exception as e:  # Pillow's readers fail in their own ways on damaged files
        kind = kind_of_bytes(head)
        is_what = f" but {kind}" if kind and kind != "a picture" else ""
        raise FormatError(
            f"{path} is not a picture that Pillow can read{is_what} ({type(e).__name__}: {e})."
        ) from e


def save_picture(picture: Any, path: Path) -> None:
    """A picture of Pillow's in the format that the name's ending says, whole or not at all.

    Raises ConfigError for an ending that Pillow does not know.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ConfigError(f"{path} has an ending that Pillow can't write. Name it .png or .jpg.")
    with replacing(path) as file:
        picture.save(file, format=kind)


def pixels(picture: Any) -> Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).float().div(127.5).sub(1).permute(2, 0, 1)[None]


def picture_layers(path: Path) -> tuple[Tensor, Tensor | None]:
    """A picture file as [1, 3, H, W] in [-1, 1], and its opacity [1, 1, H, W] in [0, 1], unless it is full."""
    layers = pixels(open_picture(path, "RGBA"))
    opacity = (layers[:, 3:] + 1) / 2
    return layers[:, :3], None if bool((opacity == 1).all()) else opacity


def square_picture(path: Path, size: int) -> Tensor:
    """The middle square of a picture file, [1, 3, size, size] in [-1, 1]."""
    picture = open_picture(path)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size))
    return pixels(square)
