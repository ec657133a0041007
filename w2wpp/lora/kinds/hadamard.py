"""LoHa (Hyeon-Woo et al. 2022; LyCORIS): the elementwise product of two low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import Delta, Dense
from .parts import Parts, scaled


class Hadamard:
    """Two pairs of matrices, (B1 A1) * (B2 A2)."""

    name = "LoHa"
    parts = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})

    def shape(self, parts: Parts) -> tuple[int, ...]:
        sizes = [parts.shape(f"hada_w{i}_{x}") for i in (1, 2) for x in "ab"]
        if any(len(size) != 2 for size in sizes):
            raise parts.error(f"is a LoHa of other than matrices: {[list(s) for s in sizes]}.")
        (a1, b1, a2, b2) = sizes
        if "hada_t1" in parts:
            t1, t2 = parts.shape("hada_t1"), parts.shape("hada_t2")
            fits = len(t1) == len(t2) == 4 and t1[2:] == t2[2:]
            fits = fits and t1[:2] == (a1[0], b1[0]) and t2[:2] == (a2[0], b2[0])
            found = (a1[1], b1[1], *t1[2:]), (a2[1], b2[1], *t2[2:])
        else:
            fits = a1[1] == b1[0] and a2[1] == b2[0]
            found = (a1[0], b1[1]), (a2[0], b2[1])
        if not fits or found[0] != found[1]:
            raise parts.error(f"is a LoHa whose matrices do not fit: {[list(s) for s in sizes]}.")
        return found[0]

    def product_rank(self, parts: Parts) -> int | None:
        if "hada_t1" in parts:
            return None
        (size_out, r1), (_, r2) = parts.shape("hada_w1_a"), parts.shape("hada_w2_a")
        return r1 * r2 if r1 * r2 <= min(size_out, parts.shape("hada_w1_b")[1]) // 2 else None

    def delta(self, parts: Parts) -> Delta:
        scale = parts.scale.of(parts.scale.rank or parts.shape("hada_w1_b")[0])
        if "hada_t1" in parts:
            return Dense(scale * _core(parts, 1) * _core(parts, 2))
        a1, b1, a2, b2 = (parts.read(f"hada_w{i}_{x}") for i in (1, 2) for x in "ab")
        if self.product_rank(parts) is None:
            return Dense(scale * (a1 @ b1) * (a2 @ b2))
        # (sum_i x_i y_i^T) * (sum_j u_j v_j^T) = sum_ij (x_i u_j)(y_i v_j)^T
        up = torch.einsum("mi,mj->mij", a1, a2).flatten(1)
        down = torch.einsum("in,jn->ijn", b1, b2).flatten(0, 1)
        return scaled(down, up, scale)


def _core(parts: Parts, i: int) -> Tensor:
    """[out, in * kh * kw] of a factor in Tucker form."""
    core = (parts.read(f"hada_{name}") for name in (f"t{i}", f"w{i}_b", f"w{i}_a"))
    return torch.einsum("ijkl,jr,ip->prkl", *core).flatten(1)
