"""DoRA (Liu et al. 2024): an update whose rows or columns are then brought to lengths of their own.

W' = m * (W + dW) / |W + dW|, so that W' - W depends on the base model's weight W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import Dense
from .parts import Parts

MAGNITUDES = frozenset({"dora_scale", "magnitude"})


def decomposed(delta: Tensor, parts: Parts, base: Tensor) -> Dense:
    """The difference to W = base [out, in] of an update [out, in] under the module's magnitudes.

    PEFT (lora_magnitude_vector) and ai-toolkit (.magnitude): a length per output, of the changed
    weight. LyCORIS and kohya (dora_scale): a length per output or per input, told by the shape; per
    output ComfyUI divides by the lengths of W itself, and what it shows is what counts here.

    Raises FormatError where sizes do not fit.
    """
    w, dw = base.double().flatten(1), delta.double()
    if w.shape != dw.shape:
        raise parts.error(f"is {list(dw.shape)}, the base model's weight {list(base.shape)}.")
    changed = w + dw
    if "magnitude" in parts:
        m = _along(parts, "magnitude", len(w)).view(-1, 1)
        length = changed.norm(dim=1, keepdim=True)
    elif parts.shape("dora_scale")[0] == len(w):
        m = _along(parts, "dora_scale", len(w)).view(-1, 1)
        length = w.norm(dim=1, keepdim=True)
    else:
        m = _along(parts, "dora_scale", w.shape[1]).view(1, -1)
        length = changed.norm(dim=0, keepdim=True)
    return Dense((changed * (m / (length + torch.finfo(torch.float32).eps)) - w).float())


def _along(parts: Parts, part: str, size: int) -> Tensor:
    m = parts.read(part).double().flatten()
    if len(m) != size:
        raise parts.error(f"has {len(m)} magnitudes for {size} rows or columns.")
    return m
