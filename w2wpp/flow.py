"""A learned map between a space's latents and N(0, I): what is sampled is Gaussian, what is decoded need not be.

People are no Gaussian cloud: some wear glasses and others don't, and nobody wears half a pair. Iterative
Gaussianisation (Chen & Gopinath 2000; Laparra et al. 2011) turns the latents to directions in which they are least
Gaussian and bends each direction by a monotone spline until it is; a few rounds of that are an invertible map with a
closed form both ways.

Letters: d latents, B batch, L rounds, M knots of a spline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, ShapeError

KNOTS = 24


class Flow(nn.Module):
    """L rounds, each a rotation [d, d] and a spline for each of the d directions; fitted by ``training.fit_flow``."""

    kind = "gaussianisation"

    rotation: Tensor
    x: Tensor
    y: Tensor
    slope: Tensor

    def __init__(self, size: int, rounds: int, knots: int = KNOTS) -> None:
        super().__init__()
        if size < 1 or rounds < 0 or knots < 2:
            raise ConfigError(
                f"A flow needs a size, rounds and two knots or more. Got {size=}, {rounds=} and {knots=}."
            )
        self.size, self.rounds, self.knots = size, rounds, knots
        line = torch.linspace(-3, 3, knots).expand(rounds, size, knots).clone()
        self.register_buffer("rotation", torch.eye(size).expand(rounds, size, size).clone())
        self.register_buffer("x", line)  # [L, d, M] increasing
        self.register_buffer("y", line.clone())  # [L, d, M] increasing
        self.register_buffer(
            "slope", torch.ones(rounds, size, knots)
        )  # dy/dx at the knots, positive

    @property
    def config(self) -> dict[str, Any]:
        """What builds the same architecture again."""
        sizes = {"size": self.size, "rounds": self.rounds, "knots": self.knots}
        return {"kind": self.kind, **sizes}

    def forward(self, z: Tensor) -> Tensor:
        """Latents z [B, d] -> standard normal coordinates u [B, d]."""
        return self.with_slopes(z)[0]

    def with_slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """u [B, d], and log |det du/dz| [B] of the change of variables."""
        self._check(z)
        total = z.new_zeros(len(z))
        for rotation, spline in self._rounds():
            z, slopes = bend(z @ rotation.T, *spline)
            total = total + slopes.log().sum(1)
        return z, total

    def push(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """A diagonal Gaussian over latents, [B, d] each -> about the one over u: linearised, correlations left out."""
        self._check(mean)
        for rotation, spline in self._rounds():
            mean, slopes = bend(mean @ rotation.T, *spline)
            variance = variance @ rotation.square().T * slopes.square()
        return mean, variance

    def inverse(self, u: Tensor) -> Tensor:
        """Standard normal coordinates u [B, d] -> latents z [B, d]."""
        self._check(u)
        for rotation, spline in reversed(self._rounds()):
            u = unbend(u, *spline) @ rotation
        return u

    def _rounds(self) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        # Rotations are kept in half precision in files; what is left of them must still be undone exactly.
        return [
            (orthonormal(r), (x, y, slope))
            for r, x, y, slope in zip(self.rotation, self.x, self.y, self.slope)
        ]

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 2 or latents.shape[1] != self.size:
            raise ShapeError(
                f"Expected latents [B, d] with d = {self.size}. Got {list(latents.shape)}."
            )


def orthonormal(rotation: Tensor) -> Tensor:
    """The nearest rotation [d, d], by one Newton-Schulz step: enough for errors of half precision."""
    return 1.5 * rotation - 0.5 * rotation @ rotation.T @ rotation


def bend(v: Tensor, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic splines (Gregory & Delbourgo 1982; Durkan et al. 2019, eq. 4).

    v [B, d] through the knots x, y [d, M] with slopes [d, M] -> values and slopes [B, d]. Straight lines go on beyond
    the outermost knots.
    """
    bin_, inside = _bins(v, x)
    (x0, x1), (y0, y1), (s0, s1) = (_ends(t, bin_) for t in (x, y, slope))
    width, secant = x1 - x0, (y1 - y0) / (x1 - x0)
    t = ((v - x0) / width).clamp(0, 1)
    curve = s0 + s1 - 2 * secant
    below = secant + curve * t * (1 - t)
    value = y0 + (y1 - y0) * (secant * t.square() + s0 * t * (1 - t)) / below
    steep = (
        secant.square()
        * (s1 * t.square() + 2 * secant * t * (1 - t) + s0 * (1 - t).square())
        / below.square()
    )
    edge = torch.where(v < x0, s0, s1)
    line = torch.where(v < x0, y0 + s0 * (v - x0), y1 + s1 * (v - x1))
    return torch.where(inside, value, line), torch.where(inside, steep, edge)


def unbend(u: Tensor, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """The inverse of ``bend``: u [B, d] -> v [B, d], the root of a quadratic (Durkan et al. 2019, eq. 6 to 8)."""
    bin_, inside = _bins(u, y)
    (x0, x1), (y0, y1), (s0, s1) = (_ends(t, bin_) for t in (x, y, slope))
    secant = (y1 - y0) / (x1 - x0)
    rise = (u - y0).clamp_min(0).minimum(y1 - y0)
    curve = s0 + s1 - 2 * secant
    a = (y1 - y0) * (secant - s0) + rise * curve
    b = (y1 - y0) * s0 - rise * curve
    c = -secant * rise
    root = (b.square() - 4 * a * c).clamp_min(0).sqrt()
    t = 2 * c / (-b - root).clamp_max(-1e-12)
    line = torch.where(u < y0, x0 + (u - y0) / s0, x1 + (u - y1) / s1)
    return torch.where(inside, x0 + t * (x1 - x0), line)


def _bins(v: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The bin [B, d] of each number among edges [d, M], the outermost for those beyond, and whether it is inside."""
    found = torch.searchsorted(edges.contiguous(), v.detach().T.contiguous(), right=True).T - 1
    inside = (v >= edges[:, 0]) & (v <= edges[:, -1])
    return found.clamp(0, edges.shape[1] - 2), inside


def _ends(values: Tensor, bin_: Tensor) -> tuple[Tensor, Tensor]:
    """values [d, M] at both ends of each bin [B, d]."""
    rows = torch.arange(values.shape[0], device=values.device)
    return values[rows, bin_], values[rows, bin_ + 1]
