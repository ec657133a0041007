"""The change of one weight, as a product of thin factors or as a whole matrix; neither is built from the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gauge import factor

ITERATIONS = 40  # of the subspace iteration, before all singular vectors are computed
CONVERGED = 1e-9  # share of the largest squared singular value


@dataclass(frozen=True, eq=False)
class Product:
    """b a, with a [R, in] and b [out, R]; the scale is in b."""

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def square(self) -> float:
        """|b a|^2, the squared Frobenius norm, from the Gram matrices of the thin factors."""
        a, b = self.a.double(), self.b.double()
        return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))

    def square_from(self, a: Tensor, b: Tensor) -> float:
        """The squared distance to another product."""
        down = torch.cat([self.a.double(), a.double()])
        return Product(down, torch.cat([self.b.double(), -b.double()], dim=1)).square()

    def best(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """As `factor`."""
        return factor(self.a, self.b, rank)


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole matrix d [out, in]."""

    d: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.d.shape[0], self.d.shape[1]

    def square(self) -> float:
        """|d|^2."""
        return float(self.d.double().square().sum())

    def square_from(self, a: Tensor, b: Tensor) -> float:
        """The squared distance to a product."""
        return float((self.d.double() - b.double() @ a.double()).square().sum())

    def best(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """As `factor`: the leading singular vectors."""
        d = self.d.double()
        tall = d if d.shape[0] >= d.shape[1] else d.T
        v = _leading(tall, min(rank, tall.shape[1]))  # [n, rank], right singular vectors of `tall`
        kept = tall @ v  # what remains of the update is kept v^T
        a, b = (v.T, kept) if tall is d else (kept.T, v)
        new_a, new_b, _ = factor(a, b, rank)
        return new_a, new_b, max(0.0, self.square() - float(kept.square().sum()))


Delta = Product | Dense


def _leading(tall: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors [n, rank] of a matrix [m, n], m >= n."""
    gram = tall.T @ tall
    width = min(rank + 8, len(gram))
    v = torch.linalg.qr(gram[:, _largest(gram, width)]).Q
    for _ in range(ITERATIONS):
        v = torch.linalg.qr(gram @ v).Q
        values, turn = torch.linalg.eigh(v.T @ gram @ v)
        v = v @ turn.flip(1)
        values = values.flip(0)
        rest = gram @ v[:, :rank] - v[:, :rank] * values[:rank]
        if float(rest.norm()) <= CONVERGED * float(values[0]):
            return v[:, :rank]
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def _largest(gram: Tensor, count: int) -> Tensor:
    return gram.diagonal().topk(count).indices
