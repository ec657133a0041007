"""LoRAs as the host's HOOKS, which act where a conditioning does."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import torch

from ...w2wpp import Layout
from .model import check_fit


class PersonHook(comfy.hooks.WeightHook):
    """The host's hook of a LoRA, which refuses a model that does not fit instead of leaving it as it is."""

    layout: Layout

    def add_hook_patches(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's own, once the model is known to fit."""
        if self.strength_model and hasattr(model.model, "diffusion_model"):
            check_fit(model, self.layout)
        return super().add_hook_patches(model, *args, **kwargs)

    def clone(self) -> PersonHook:
        """The host's own, with the layout."""
        copy = super().clone()
        copy.layout = self.layout
        return copy


def person_hooks(layout: Layout, lora: dict[str, torch.Tensor], strength: float) -> Any:
    """HOOKS of one LoRA in kohya's spelling."""
    hook = PersonHook(strength_model=strength, strength_clip=0.0)
    hook.layout, hook.weights = layout, lora
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group
