"""A prompt as the host's sampler gives it to a model: tokens, and whatever else the model wants beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...w2wpp.errors import ConfigError, LayoutMismatch
from .model import inpainting

# What a conditioning may carry that acts on a part of the picture or of the sampling only, or through other models.
ELSEWHERE = {
    "area": "a region",
    "mask": "a mask",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "start_percent": "a start",
    "end_percent": "an end",
    "clip_start_percent": "a schedule",
}
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}  # that is no part


def check_prompt(conditioning: list) -> None:
    """Raises ConfigError unless a conditioning is one prompt for the whole picture, in all of the sampling."""
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise ConfigError(
            f"Inversion takes one prompt. Got {len(conditioning)} combined ones; connect a single CLIP Text Encode."
        )
    options = conditioning[0][1]
    carried = [
        what for key, what in ELSEWHERE.items() if key in options and options[key] != WHOLE.get(key)
    ]
    if carried:
        raise ConfigError(
            f"Inversion takes a prompt for the whole picture and all of the sampling. This one carries "
            f"{' and '.join(carried)}; connect the CLIP Text Encode itself, or what adds guidance or sizes to it."
        )


class Prompt:
    """What a model is given beside noisy pictures, for batches of any size."""

    def __init__(
        self,
        base: Any,
        conditioning: list,
        latents: Tensor,
        *,
        kept_on: torch.device | str | None = None,
    ) -> None:
        """``base`` is the host's BaseModel, ``latents`` [1, C, ..., h, w] of the shape and place that it works on.

        One of many is kept elsewhere until it is needed.
        """
        conds = {
            "positive": [
                {key: _ordinary(value) for key, value in cond.items()}
                for cond in comfy.sampler_helpers.convert_cond(conditioning)
            ]
        }
        device, zeros = latents.device, torch.zeros_like(latents)
        conds = comfy.samplers.process_conds(base, zeros, conds, device, zeros, None, 0)
        self._conds = {
            key: _placed(cond, kept_on or device)
            for key, cond in conds["positive"][0]["model_conds"].items()
        }
        self._batches: dict[int, dict[str, Any]] = {}

    def require_no_picture(self, model: Any, channels: int) -> None:
        """Raises LayoutMismatch if the model wants more of a picture than its noisy latents."""
        beside = self._conds.get("c_concat")
        if beside is not None:
            raise LayoutMismatch(inpainting(model, channels + beside.cond.shape[1], channels))

    def batch(self, size: int) -> dict[str, Any]:
        """Keywords of the model for a batch."""
        if size not in self._batches:
            processed = {
                key: cond.process_cond(batch_size=size, area=None).cond
                for key, cond in self._conds.items()
            }
            self._batches = {size: processed}  # sizes alternate once in a run, at its end
        return self._batches[size]

    def goes_with(self, other: Prompt) -> bool:
        """Whether the host's sampler would put both into one batch."""
        mine, theirs = self._conds, other._conds
        return mine.keys() == theirs.keys() and all(
            c.can_concat(theirs[k]) for k, c in mine.items()
        )


def side_by_side(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Rows of a batch in parts whose prompts go together; those of one length, say."""
    parts: list[list[int]] = []
    known: dict[Prompt, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if prompt not in known:
            fits = (part for part in parts if prompts[part[0]].goes_with(prompt))
            known[prompt] = next(fits, [])
            if not known[prompt]:
                parts.append(known[prompt])
        known[prompt].append(row)
    return parts


def joined(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Any]:
    """Keywords of the model for a batch of which each row has a prompt of its own; all go together."""
    different = list(dict.fromkeys(prompts))
    places = {prompt: i for i, prompt in enumerate(different)}
    rows = torch.tensor([places[prompt] for prompt in prompts])
    found = {}
    for key in different[0]._conds:
        first, *others = (p._conds[key].process_cond(batch_size=1, area=None) for p in different)
        value = first.concat(others)
        if isinstance(first, comfy.conds.CONDConstant):
            found[key] = value.to(device) if isinstance(value, Tensor) else value
        elif isinstance(value, list):
            found[key] = [part[rows.to(part.device)].to(device) for part in value]
        else:
            found[key] = value[rows.to(value.device)].to(device)
    return found


def _ordinary(value: Any) -> Any:
    """Tensors made in inference mode, and lists and dictionaries of them, as ones that gradients may pass by."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _ordinary(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_ordinary, value))
    return value


def _placed(cond: Any, device: torch.device | str) -> Any:
    held = cond.cond
    if isinstance(held, Tensor):
        held = _away(held, device)
    elif isinstance(held, list):
        held = [_away(t, device) if isinstance(t, Tensor) else t for t in held]
    return cond._copy_with(held)


def _away(t: Tensor, device: torch.device | str) -> Tensor:
    t = t.detach().to(device)
    return t.clone() if t.is_inference() else t
