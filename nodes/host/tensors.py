"""Tensors as the host hands them around."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leave the inference mode in which the host runs every node, still without gradients.

    What is computed inside it can be kept by a space and later be part of a differentiable computation, which tensors
    made in inference mode can't.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def trainable() -> Iterator[None]:
    """Leave the host's inference mode, with gradients, for training a small network of one's own."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def read_picture(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE [1, H, W, 3] and MASK [1, H, W] of a picture file; the mask is its opacity."""
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.asarray(file.convert("RGBA")).copy()).float() / 255
    return pixels[None, ..., :3], pixels[None, ..., 3]
