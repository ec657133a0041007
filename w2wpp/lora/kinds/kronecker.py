"""LoKr (Yeh et al. 2024, LyCORIS): the Kronecker product of two matrices, each whole or of low rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..products import Delta, Dense
from .parts import Parts, scaled


class Kronecker:
    """Two factors, each a matrix or a pair of them."""

    name = "LoKr"
    parts = frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    )

    def shape(self, parts: Parts) -> tuple[int, ...]:
        w1, w2 = _size(parts, 1), _size(parts, 2)
        return w1[0] * w2[0], w1[1] * w2[1], *(w2[2:] if any(n != 1 for n in w2[2:]) else ())

    def product_rank(self, parts: Parts) -> int | None:
        if "lokr_w2" in parts or "lokr_t2" in parts:
            return None
        (rows, columns), a, b = (
            _size(parts, 1)[:2],
            parts.shape("lokr_w2_a"),
            parts.shape("lokr_w2_b"),
        )
        size_in = columns * math.prod(b[1:])
        rank = columns * a[1]
        return rank if rank <= min(rows * a[0], size_in) // 2 else None

    def delta(self, parts: Parts) -> Delta:
        rank = _rank(parts)
        scale = parts.scale.of(rank) if rank else 1.0
        w1 = _whole(parts, 1)
        if self.product_rank(parts) is not None:
            a, b = parts.matrix("lokr_w2_a"), parts.matrix("lokr_w2_b")
            # w1 x (a b) = (w1 x a)(1 x b)
            eye = torch.eye(w1.shape[1])
            return scaled(torch.kron(eye, b), torch.kron(w1, a), scale)
        w2 = _whole(parts, 2)
        return Dense(scale * torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2).flatten(1))


def _rank(parts: Parts) -> int | None:
    """What alpha is divided by: the second factor's rank, or the first's; of whole ones there is none."""
    for i in (2, 1):
        if f"lokr_w{i}" not in parts:
            return parts.shape(f"lokr_w{i}_b")[0]
    return parts.scale.rank


def _size(parts: Parts, i: int) -> tuple[int, ...]:
    if f"lokr_w{i}" in parts:
        size = parts.shape(f"lokr_w{i}")
        if len(size) not in (2, 4) or (i == 1 and len(size) != 2):
            raise parts.error(f"is a LoKr whose factor {i} is {list(size)}.")
        return size
    a, b = parts.shape(f"lokr_w{i}_a"), parts.shape(f"lokr_w{i}_b")
    if i == 2 and "lokr_t2" in parts:
        core = parts.shape("lokr_t2")
        fits = len(core) == 4 and len(a) == len(b) == 2 and core[:2] == (a[0], b[0])
        found = (a[-1], b[-1], *core[2:])
    else:
        fits, found = len(a) == 2 and len(b) in (2, 4) and a[1] == b[0], (a[0], *b[1:])
    if not fits:
        raise parts.error(f"is a LoKr whose factor {i} does not fit: {list(a)} and {list(b)}.")
    return found


def _whole(parts: Parts, i: int) -> Tensor:
    if f"lokr_w{i}" in parts:
        return parts.read(f"lokr_w{i}")
    a, b = parts.read(f"lokr_w{i}_a"), parts.read(f"lokr_w{i}_b")
    if i == 2 and "lokr_t2" in parts:
        return torch.einsum("ijkl,jr,ip->prkl", parts.read("lokr_t2"), b, a)
    return (a @ b.flatten(1)).view(len(a), *b.shape[1:])
