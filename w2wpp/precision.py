"""Whether half precision is the fast way on this computer's processor.

Processors with instructions for bf16 multiply about twice as fast with it. On all others PyTorch falls back to loops
that are ten to forty times slower than single precision, and says nothing.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch

_INSTRUCTIONS = ("avx512_bf16", "amx_tile")  # as PyTorch's questions name them


@functools.lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself (AVX-512 BF16 or AMX)."""
    questions = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in _INSTRUCTIONS)
    return any(question() for question in questions if question is not None)


def quick_products() -> AbstractContextManager[None]:
    """A block whose matrix products and convolutions on the CPU run in bf16 where that is faster, else as they are.

    Parameters, gradients and everything that is added up stay in single precision. Results of two computers differ by
    the rounding of bf16, far below the 8 bits of a picture.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16())
