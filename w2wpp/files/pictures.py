"""Picture files for the command line; needs Pillow, which the host brings and outside of it an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError


def open_picture(path: Path) -> Any:
    """A picture file in RGB, as Pillow holds it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UnidentifiedImageError as e:
        raise FormatError(f"{path} is not a picture that Pillow can read.") from e


def pixels(picture: Any) -> Tensor:
    """[1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).float().div(127.5).sub(1).permute(2, 0, 1)[None]
