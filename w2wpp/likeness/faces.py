"""Where the face is in a picture that is compared, and the square about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..files.pictures import picture_layers
from ..inversion.framing import Framing
from ..placement import Frame, crop, place_box
from ..space import Space

LOOK = 64  # pixels per side, enough to be found by


@dataclass(frozen=True)
class Faces:
    """Squares about faces: by a box where there is one, else by what a space's start network finds, else whole.

    `margin` is the side of the square in larger sides of the face.
    """

    space: Space | None = None
    margin: float = 1.1

    def __call__(
        self, path: Path, size: int, box: tuple[float, float, float, float] | None = None
    ) -> tuple[Tensor, str]:
        """The face of a picture file [1, 3, size, size] in [-1, 1], and how it was found: box, found, whole.

        Raises FormatError for what is no picture, DataError for a box that lies outside.
        """
        picture, _ = picture_layers(path)
        if box is not None:
            height, width = picture.shape[-2:]
            head = place_box(torch.tensor([box], dtype=torch.float32), (height, width))
            reach = torch.tensor([width, height]) / min(height, width)
            if bool((head[0, :2].abs() > reach).any()):
                raise DataError(f"{path}: the box of the face, {box}, lies outside of the picture.")
            return self._about(picture, head, size), "box"
        start = None if self.space is None else self.space.start
        if self.space is None or start is None or not start.locates:
            return crop(picture, torch.zeros(1, 4), size)[0], "whole"
        frame = self.space.frame or Frame()
        framed = Framing(frame, start)(picture, LOOK)
        return self._about(picture, frame.head(framed.placement), size), framed.how[0]

    def _about(self, picture: Tensor, head: Tensor, size: int) -> Tensor:
        side = head[:, 2:].amax(1, keepdim=True) * self.margin
        place = torch.cat([head[:, :2], side.log(), torch.zeros(1, 1)], dim=1)
        return crop(picture, place, size)[0]
