"""A CLIP_VISION of the host's as what a start network sees with."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...w2wpp import Space
from ...w2wpp.errors import ConfigError

AT_ONCE = 16  # pictures


class HostVision:
    """Features of pictures: what the model says of the whole, and the mean of what its last but one layer says of the
    parts. The host loads the model, and looks after where it is."""

    def __init__(self, clip_vision: Any) -> None:
        if not callable(getattr(clip_vision, "encode_image", None)):
            raise ConfigError(
                f"'clip_vision' takes a vision model from Load CLIP Vision. Got {type(clip_vision).__name__}."
            )
        self._clip_vision = clip_vision

    @property
    def name(self) -> str:
        """Kind, width and depth, as its configuration says."""
        config = getattr(self._clip_vision, "config", None) or {}
        kind = config.get("model_type", type(getattr(self._clip_vision, "model", None)).__name__)
        layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
        return f"{kind}, {layers} layers of {width}" if layers and width else str(kind)

    def describe(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] in [-1, 1] -> features [n, V]. Raises if Cancel was pressed."""
        image = (pictures.movedim(1, -1).float().clamp(-1, 1) + 1) / 2
        parts = []
        with torch.inference_mode():  # the weights were made in it
            for some in image.split(AT_ONCE):
                comfy.model_management.throw_exception_if_processing_interrupted()
                parts.append(_features(self._clip_vision.encode_image(some)))
            found = torch.cat(parts)
        with torch.inference_mode(False):
            return found.clone()


def _features(output: Any) -> Tensor:
    """[n, V] of what the host gives."""
    whole, parts = output["image_embeds"], output["penultimate_hidden_states"]
    seen = [] if whole is None else [whole]
    seen += [] if parts is None else [parts.flatten(1, -2).mean(1)]
    if not seen:
        raise ConfigError(
            "This vision model gives no features of pictures. Connect a CLIP, SigLIP or DINO model."
        )
    return torch.cat([part.float().flatten(1).cpu() for part in seen], dim=1)


def with_sight(space: Space, clip_vision: Any) -> tuple[Space, tuple[str, ...]]:
    """A space that sees with what its start network was taught with, and remarks for the report.

    Raises ConfigError where that is missing or another one.
    """
    start = space.start
    if start is None or start.sight is None:
        needless = "'clip_vision' was not needed: the space has no start network that sees with it."
        return space, (needless,) if clip_vision is not None else ()
    vision = None if clip_vision is None else HostVision(clip_vision)
    return space.with_(start=start.seeing(vision)), ()
