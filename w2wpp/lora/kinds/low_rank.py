"""LoRA (Hu et al. 2021), and LoCon for convolutions, with or without a matrix between the two."""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import Product
from .parts import Parts, scaled


class LowRank:
    """Two matrices, B A."""

    name = "LoRA"
    parts = frozenset({"down", "up", "mid"})

    def shape(self, parts: Parts) -> tuple[int, ...]:
        if "down" not in parts or "up" not in parts:
            raise parts.error("has only one of its two matrices. Download or copy it again.")
        down, up = parts.shape("down"), parts.shape("up")
        if len(down) not in (2, 3, 4, 5) or len(up) not in (2, 3, 4, 5):
            raise parts.error(f"has no matrices: A {list(down)}, B {list(up)}.")
        if "mid" in parts:
            mid = parts.shape("mid")
            fits = len(mid) == 4 and mid[:2] == (up[1], down[0])
            kernel = mid[2:]
        else:
            fits = down[0] == up[1] and all(n == 1 for n in up[2:])
            kernel = down[2:]
        if not fits:
            raise parts.error(
                f"is of two ranks: A {list(down)}, B {list(up)} differ in their ranks."
            )
        return up[0], down[1], *(kernel if any(n != 1 for n in kernel) else ())

    def product_rank(self, parts: Parts) -> int:
        return parts.shape("down")[0]

    def delta(self, parts: Parts) -> Product:
        a, b = parts.matrix("down"), parts.matrix("up")
        rank = len(a)
        if "mid" in parts:  # CP: kernels between two 1 x 1 convolutions
            a = _through(parts.read("mid"), a)
        return scaled(a, b, parts.scale.of(rank))


def _through(mid: Tensor, a: Tensor) -> Tensor:
    """[r, r, kh, kw] behind a [r, in] -> [r, in * kh * kw]."""
    return torch.einsum("ijkl,jn->inkl", mid, a).flatten(1)
