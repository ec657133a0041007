"""Which layers of a model of the host's LoRAs can be trained for, and what they are called in files."""

from __future__ import annotations

import re
from typing import Any

import comfy.utils

from ...w2wpp import SD15, Layout, Module
from ...w2wpp.errors import ConfigError
from ...w2wpp.lora.families import UNKNOWN, Shape, recognise
from .model import model_name

PREFIX = "diffusion_model."
_ATTENTION = r"(^|\.)(\w*_)?(attn|attention)\d*\."
_FUSED = r"(^|\.)single_blocks\.\d+\.linear"  # attention and what follows it, in one layer
_FEED_FORWARD = r"(^|\.)(\w+_)?(ff|ffn|mlp|feed_forward)(_context)?\."
CHOICES = {
    "attention, q and v": rf"{_ATTENTION}(.*[._])?(q|v|qkv|q_proj|v_proj)$|{_FUSED}1$",
    "attention": rf"{_ATTENTION}|{_FUSED}1$",
    "attention and feed-forward": rf"{_ATTENTION}|{_FEED_FORWARD}|{_FUSED}[12]$",
}


def layout_for(model: Any, choice: str, rank: int, alpha: float) -> Layout:
    """The layout of LoRAs for some linear layers of a model, under the names that LoRA files have for them.

    q and v of SD 1.5 at rank 1 and alpha 27 are the layout of weights2weights. Raises ConfigError for a model without
    such layers.
    """
    shapes = {
        name: size for name, size in _linear(model).items() if re.search(CHOICES[choice], name)
    }
    if not shapes:
        raise ConfigError(
            f"{model_name(model)} has no layers that are called {choice!r}. Choose other modules to train."
        )
    modules = tuple(
        Module(name, size_in, size_out) for name, (size_out, size_in) in sorted(shapes.items())
    )
    if (modules, rank, alpha) == (SD15.modules, SD15.rank, SD15.alpha):
        return SD15
    family = recognise({m.name: Shape(m.in_features, m.out_features) for m in modules})
    if family == UNKNOWN:
        family = type(model.model).__name__.removesuffix("Model").lower()
    return Layout(family, family, modules, rank, alpha)


def _linear(model: Any) -> dict[str, tuple[int, int]]:
    """{name: (out, in)} of the linear layers of a model's network, those of UNets as diffusers calls them."""
    weights = model.model.state_dict()
    renamed = {
        f"{PREFIX}{own}": name
        for name, own in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
    }
    found = {}
    for key, weight in weights.items():
        if key.startswith(PREFIX) and key.endswith(".weight") and weight.ndim == 2:
            name = renamed.get(key, key.removeprefix(PREFIX)).removesuffix(".weight")
            found[name] = tuple(weight.shape)
    return found
