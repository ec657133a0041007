"""LoRAs as patches of a model of the host's."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.patcher_extension
import torch

from ...w2wpp import Layout
from ...w2wpp.errors import LayoutMismatch, check_finite
from ...w2wpp.lora.families import lora_keys
from .model import Target, check_fit, check_fit_of_texts, place_of


def patched_each(
    model: Any,
    layout: Layout,
    loras: Sequence[Mapping[str, torch.Tensor]],
    strength: float,
    start: float = 0.0,
) -> list[Any]:
    """A copy of ``model`` for each LoRA in kohya's spelling, with it added; the model itself is not changed.

    Raises unless every module of ``layout`` is in the model with the layout's shape, because the host only logs what
    it can't place. Strength 0 adds nothing at all, so that not even rounding differs from the bare model. With
    ``start`` the LoRAs only act from that share of the sampling on.
    """
    check_finite("Applying a LoRA", strength=strength, start=start)
    keys = _by_key(check_fit(model, layout))
    return [_patched(model, keys, layout, dict(lora), strength, start) for lora in loras]


def patched_texts_each(
    clip: Any, layout: Layout, loras: Sequence[Mapping[str, torch.Tensor]], strength: float
) -> list[Any]:
    """The same for LoRAs of text encoders and a CLIP, which is asked once, before the sampling."""
    check_finite("Applying a LoRA", strength=strength)
    keys = _by_key(check_fit_of_texts(clip, layout))
    return [_patched(clip, keys, layout, dict(lora), strength, 0.0) for lora in loras]


def _by_key(targets: Mapping[str, Target]) -> dict[str, Target]:
    keys = lora_keys(targets)
    return {keys[name]: target for name, target in targets.items()}


def _patched(
    model: Any,
    keys: dict[str, Target],
    layout: Layout,
    lora: dict[str, torch.Tensor],
    strength: float,
    start: float,
) -> Any:
    copy = model.clone()
    if strength == 0:
        return copy
    patches = comfy.lora.load_lora(lora, keys)
    added = (
        _delay(copy, patches, strength, start) if start > 0 else copy.add_patches(patches, strength)
    )
    if len(added) != len(layout.modules):
        raise LayoutMismatch(
            f"The host took {len(added)} of the {len(layout.modules)} LoRA weights of the layout {layout.name!r}"
        )
    return copy


class _Gate:
    """Open while the model is asked about noise at or below the level at which ``start`` of the sampling is over."""

    def __init__(self, start: float) -> None:
        self.start, self.is_open = start, False

    def __call__(
        self, apply_model: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        level = apply_model.class_obj.model_sampling.percent_to_sigma(self.start)
        self.is_open = float(sigma.max()) <= level
        return apply_model(x, sigma, *args, **kwargs)


@dataclass(frozen=True)
class _DelayedPatch:
    """What the host asks for a weight each time it is used: the patched one while the gate is open."""

    gate: _Gate
    key: str
    patch: tuple

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.gate.is_open:
            return weight
        return comfy.lora.calculate_weight([self.patch], weight.clone(), self.key, weight.dtype)


def _delay(model: Any, patches: dict[Target, Any], strength: float, start: float) -> list[Target]:
    """Add patches that act from ``start`` of the sampling on; returns where they went.

    The weights themselves stay as they are and are patched while they are used. The host's weight hooks would do it
    otherwise, but they sit on conditionings, and need a second copy of a model that is streamed to the GPU.
    """
    gate = _Gate(start)
    known = model.model_state_dict()
    places = {target: place_of(target) for target in patches}
    added = [target for target, (key, _, _) in places.items() if key in known]
    for target in added:
        key, rows, function = places[target]
        patch = (strength, patches[target], 1.0, rows, function)
        model.add_weight_wrapper(key, _DelayedPatch(gate, key, patch))
    model.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, gate)
    # Or the host takes the weights that it has loaded for another copy, without wrappers, for this one's.
    model.patches_uuid = uuid.uuid4()
    return added
