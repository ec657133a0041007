"""What callers may give where a tensor is expected: tensors and numpy arrays of real numbers, nothing guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ShapeError

Array = Any  # a tensor, or a numpy array
# By type: whole numbers of its size, and the bits of infinity.
_INFINITY = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def as_tensor(value: Array, what: str) -> Tensor:
    """A tensor as it is, a numpy array [any shape] as a tensor of its own on the CPU; `what` names it in errors.

    Raises ShapeError for anything else: a list could as well be a list of vectors, and complex or boolean numbers
    are nobody's weights.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(np.ascontiguousarray(value).copy())
    if not isinstance(value, Tensor):
        kind = (
            f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise ShapeError(f"Expected {what} as a tensor or numpy array of real numbers. Got {kind}.")
    if value.is_complex() or value.dtype == torch.bool:
        raise ShapeError(f"Expected {what} of real numbers. Got a tensor of {value.dtype}.")
    return value


def as_batch(value: Array, size: int, what: str, letter: str) -> Tensor:
    """A tensor or array [B, size] as a tensor; the letter names its width in errors.

    Raises ShapeError for any other shape.
    """
    t = as_tensor(value, f"{what} [B, {letter}]")
    if t.ndim != 2 or t.shape[1] != size:
        raise ShapeError(
            f"Expected {what} [B, {letter}] with {letter} = {size}. Got {list(t.shape)}."
        )
    return t


def is_finite(t: Tensor) -> bool:
    """Whether a tensor [any shape] of any type holds neither NaN nor infinity.

    On the CPU by the bits of its numbers, elsewhere by its extremes, which NaN and infinity reach: either is many
    times faster than a look at every number, and bits ask for no second thread.
    """
    if not t.numel():
        return True
    if t.is_complex():
        t = torch.view_as_real(t)
    if t.device.type == "cpu" and t.dtype in _INFINITY:
        whole, infinity = _INFINITY[t.dtype]
        # Bits of positive numbers are in the numbers' order, with infinity and NaN at the top. Those of negative
        # numbers are as well, above them, once the sign counts as the highest bit.
        bits = t.detach().view(whole).numpy()
        unsigned = bits.view(bits.dtype.str.replace("i", "u"))
        sign = 1 << (8 * t.dtype.itemsize - 1)
        return bool(bits.max() < infinity and unsigned.max() < sign + infinity)
    low, high = torch.aminmax(t.float() if t.dtype.itemsize == 1 else t)  # fp8 has no order here
    return bool(torch.isfinite(low) and torch.isfinite(high))
