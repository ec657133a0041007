"""People who were painted, and what of their latents shows in the paintings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from .fit_start import LabelMap

EVEN = 1e-3  # ridge of linear fits from latents, in mean eigenvalues


@dataclass(frozen=True, eq=False)
class PaintedPeople:
    """n people, m paintings of each, every one in another scene."""

    z: Tensor  # [n, d] what they were painted with
    bank: Tensor  # [n, m, 3, S, S] int8, 127 is white

    def __post_init__(self) -> None:
        if self.z.ndim != 2 or self.bank.ndim != 5 or self.bank.shape[2] != 3:
            raise ShapeError(
                "Paintings are latents [n, d] and a bank [n, m, 3, S, S]. Got "
                f"{list(self.z.shape)} and {list(self.bank.shape)}."
            )
        if len(self.z) != len(self.bank) or self.bank.shape[1] < 1:
            raise ShapeError(f"Got latents of {len(self.z)} people, paintings of {len(self.bank)}.")

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, rows: Tensor) -> PaintedPeople:
        return PaintedPeople(self.z[rows], self.bank[rows])

    def pictures(self, people: Tensor, scene: Tensor) -> Tensor:
        """[k, 3, S, S] in [-1, 1] of people [k] in scenes [k]."""
        return self.bank[people, scene].float() / 127

    def anyone(self, count: int, generator: torch.Generator) -> Tensor:
        """Paintings [count, 3, S, S] of anybody."""
        n, m = self.bank.shape[:2]
        people = torch.randint(n, (count,), generator=generator)
        return self.pictures(people, torch.randint(m, (count,), generator=generator))


@dataclass(frozen=True, eq=False)
class Readable:
    """r directions of latents that show in pictures."""

    directions: Tensor  # [d, r] orthonormal
    share: Tensor  # [r] of each coordinate's variance that a linear fit of pictures tells, falling

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.directions


def readable(seen: Tensor, z: Tensor, *, most: int, least_share: float) -> Readable:
    """From what is seen of people [n, k] (anything that pictures decide) and their latents [n, d].

    Shares are those that would hold for people who are new: the fit's own flattery (its degrees of freedom) is
    subtracted.
    """
    n, d = z.shape
    seen = (seen - seen.mean(0)).double()
    spread, basis = torch.linalg.eigh(seen.T @ seen / n)
    keep = min(seen.shape[1], max(1, n // 6))
    wide = basis[:, -keep:] * spread[-keep:].clamp_min(1e-9 * float(spread[-1])).rsqrt()
    white = seen @ wide  # [n, keep], uncorrelated
    fit = LabelMap.fit(z.double(), white, penalty=EVEN)
    left = white - fit(z.double())
    freedom = max(1, n - d - 1)
    noise = left.T @ left / freedom
    values, vectors = torch.linalg.eigh(noise)
    root = vectors @ (values.clamp_min(1e-6).rsqrt()[:, None] * vectors.T)
    u, strength, _ = torch.linalg.svd(fit.weights @ root, full_matrices=False)  # [d, r], [r]
    # Noise alone has singular values up to about sqrt(d/n) + sqrt(k/n) (Marchenko & Pastur 1967).
    flattery = (d**0.5 + keep**0.5) ** 2 / n
    signal = (strength.square() - flattery).clamp_min(0)
    share = signal / (1 + signal)
    count = max(1, min(most, int((share >= least_share).sum())))
    return Readable(u[:, :count].float(), share[:count].float())
