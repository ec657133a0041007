"""Leading eigenpairs of a large matrix that is only known by its products: block Lanczos.

The subspace spanned by R, C R, C^2 R, ... (R random, b columns) holds the leading eigenvectors far
better than subspace iteration's last block does, also where eigenvalues lie close together (Musco
and Musco 2015). It is kept orthonormal in full, and restarted from its best vectors when it
outgrows its limit (thick restart, Wu and Simon 2000). C is self-adjoint under the inner product
<x, y> = x . G y, which is the plain one for G = I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

ROWS = 8192  # of a basis [P, m] that are turned at a time


@dataclass(frozen=True)
class Convergence:
    """How an iteration ended. Losses are estimates from how the last steps fell off."""

    converged: bool
    iterations: int  # products with C, each one pass over the data
    subspace: int  # its size m
    variance_lost: float  # share of the captured variance that further steps would still find
    value_error: float  # relative, of the worst eigenvalue's square root
    tolerance: float
    history: tuple[float, ...] = ()  # captured variance after every iteration

    def __str__(self) -> str:
        text = "converged" if self.converged else "NOT converged"
        return (
            f"{text} in {self.iterations} iterations: an estimated {self.variance_lost:.1e} of the captured "
            f"variance is lost, singular values are off by {self.value_error:.1e} at most"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, rounded for reading."""
        return {
            "converged": self.converged,
            "iterations": self.iterations,
            "subspace": self.subspace,
            "variance_lost": float(f"{self.variance_lost:.3g}"),
            "value_error": float(f"{self.value_error:.3g}"),
            "tolerance": self.tolerance,
        }


Apply = Callable[[Tensor], Tensor]  # [P, b] -> [P, b]


@dataclass
class BlockLanczos:
    """The state of an iteration for the k leading eigenpairs; `step` and `finish` do the work.

    apply: G x [P, b] -> C x [P, b], one pass over the data; dual: x [P, b] -> G x [P, b].
    """

    k: int
    size: int  # P
    block: int  # b
    limit: int  # m at most, before a restart
    tolerance: float  # share of the captured variance that may be lost
    apply: Apply
    dual: Apply
    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0
    basis: Tensor = field(init=False)  # [P, capacity], the first m columns are in use
    projected: Tensor = field(init=False)  # [m, m] of C, for the first `applied` columns
    columns: int = 0  # m
    applied: int = 0  # columns whose product with C is known
    iterations: int = 0
    history: list[float] = field(default_factory=list)
    values: Tensor | None = None  # the last estimates [k]
    worst: list[float] = field(default_factory=list)  # largest relative change of a value

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.size)
        capacity = min(self.limit + self.block, self.size)
        self.basis = torch.empty(self.size, capacity, dtype=self.dtype, device=self.device)
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=self.device)

    def start(self) -> None:
        """The first block: one product with a random matrix, which leaves the null space of C out."""
        generator = torch.Generator().manual_seed(self.seed)
        width = min(self.block, self.basis.shape[1])
        r = torch.randn(self.size, width, generator=generator, dtype=self.dtype).to(self.device)
        self._append(self.apply(r))
        self.iterations += 1

    @property
    def exhausted(self) -> bool:
        """Nothing is left that products with C could find."""
        return self.applied == self.columns

    @property
    def convergence(self) -> Convergence:
        """How far the iteration has come."""
        lost, error = self._outlook()
        done = self.exhausted or (lost <= self.tolerance / 2 and error <= 10 * self.tolerance / 4)
        return Convergence(
            done, self.iterations, self.columns, lost, error, self.tolerance, tuple(self.history)
        )

    def step(self) -> None:
        """One product with C, the new estimates, and the next block."""
        first, last = self.applied, self.columns
        y = self.apply(self.dual(self.basis[:, first:last]))
        self.iterations += 1
        coupling = self._along(y, last)  # [m, b]
        self.projected[:last, first:last] = coupling
        self.projected[first:last, :last] = coupling.T
        square = self.projected[first:last, first:last]
        self.projected[first:last, first:last] = (square + square.T) / 2
        self.applied = last
        self._estimate()
        y -= self._times(coupling.to(self.dtype), last)
        if last + y.shape[1] > self.limit:
            self._restart()
        self._append(y)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k] and eigenvectors [P, k]; the basis is used up."""
        values, vectors = self._ritz()
        k = min(self.k, self.applied)
        self._turn(vectors[:, :k])
        return values[:k], self.basis[:, :k]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) of everything that changes."""
        m = self.columns
        tensors = {"basis": self.basis[:, :m], "projected": self.projected[:m, :m]}
        if self.values is not None:
            tensors["values"] = self.values
        names = ("columns", "applied", "iterations", "history", "worst")
        return tensors, {name: getattr(self, name) for name in names}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        m = int(numbers["columns"])
        self.basis[:, :m] = tensors["basis"]
        self.projected[:m, :m] = tensors["projected"]
        values = tensors.get("values")
        self.values = None if values is None else values.to(self.device)
        for name, value in numbers.items():
            setattr(self, name, value)

    def _along(self, y: Tensor, m: int) -> Tensor:
        """Inner products [m, b] of the first m columns with y [P, b], added up in double precision."""
        dual = self.dual(y)
        total = torch.zeros(m, y.shape[1], dtype=torch.float64, device=self.device)
        for i in range(0, self.size, ROWS):
            rows = slice(i, i + ROWS)
            total += self.basis[rows, :m].T @ dual[rows]
        return total

    def _times(self, coefficients: Tensor, m: int) -> Tensor:
        return self.basis[:, :m] @ coefficients

    def _append(self, y: Tensor) -> None:
        """Columns of y [P, b] that are new, orthonormal to all that are there."""
        m = self.columns
        lengths = self._lengths(y)
        if self.values is None and not bool(lengths.max() > 0):
            raise DataError("The training rows do not vary at all.")
        # Rounding leaves residuals of about 1e-7 of the largest eigenvalue, which are no directions.
        largest = float(lengths.max()) if self.values is None else float(self.values[0])
        floor = 5e-7 * largest
        for turn in range(3):
            if m:
                y = y - self._times(self._along(y, m).to(self.dtype), m)
            y, kept = self._orthonormal(y, floor if turn == 0 else 0.5)
            if not kept:
                return
        room = self.basis.shape[1] - m
        y = y[:, :room]
        self.basis[:, m : m + y.shape[1]] = y
        self.columns = m + y.shape[1]

    def _orthonormal(self, y: Tensor, floor: float) -> tuple[Tensor, int]:
        """An orthonormal basis of y's columns, without directions shorter than `floor`."""
        gram = self._inner(y)
        values, vectors = torch.linalg.eigh(gram)
        keep = values > max(floor**2, 1e-12 * float(values[-1].clamp_min(0)))
        turn = vectors[:, keep] / values[keep].sqrt()
        return y @ turn.flip(1).to(self.dtype), int(keep.sum())

    def _inner(self, y: Tensor) -> Tensor:
        dual = self.dual(y)
        total = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=self.device)
        for i in range(0, self.size, ROWS):
            total += y[i : i + ROWS].T @ dual[i : i + ROWS]
        return (total + total.T) / 2

    def _lengths(self, y: Tensor) -> Tensor:
        return (y * self.dual(y)).sum(0, dtype=torch.float64).clamp_min(0).sqrt()

    def _ritz(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.projected[: self.applied, : self.applied])
        return values.flip(0), vectors.flip(1)

    def _estimate(self) -> None:
        values = torch.linalg.eigvalsh(self.projected[: self.applied, : self.applied]).flip(0)
        values = values[: self.k].clamp_min(0)
        if self.values is not None and len(self.values) == len(values) == self.k:
            grown = (values - self.values) / values.clamp_min(1e-10 * values[0])
            self.worst.append(float(grown.max().clamp_min(0)))
        self.values = values
        self.history.append(float(values.sum()))

    def _outlook(self) -> tuple[float, float]:
        """(share of the captured variance still to come, relative error of the worst singular value).

        Growth falls off geometrically or faster: with the ratio of the last two steps, what is to
        come is last * ratio / (1 - ratio).
        """
        if self.exhausted:
            return 0.0, 0.0
        if len(self.history) < 3 or len(self.worst) < 2:
            return 1.0, 1.0
        grown = [b - a for a, b in zip(self.history[-3:], self.history[-2:])]
        lost = _tail(grown[0], grown[1]) / self.history[-1]
        return lost, _tail(*self.worst[-2:]) / 2

    def _restart(self) -> None:
        """Keep the best Ritz vectors only; C is diagonal on them."""
        keep = min(self.applied, max(self.k + self.block // 2, self.limit - 3 * self.block))
        values, vectors = self._ritz()
        self._turn(vectors[:, :keep])
        self.projected.zero_()
        self.projected[:keep, :keep] = torch.diag(values[:keep])
        self.columns = self.applied = keep

    def _turn(self, vectors: Tensor) -> None:
        """basis[:, :k] = basis[:, :m] @ vectors [m, k], in place."""
        m, k = vectors.shape
        turn = vectors.to(self.dtype)
        for i in range(0, self.size, ROWS):
            self.basis[i : i + ROWS, :k] = self.basis[i : i + ROWS, :m] @ turn


def _tail(before: float, last: float) -> float:
    last = max(last, 0.0)
    if last == 0.0:
        return 0.0
    ratio = min(0.95, max(0.1, last / before)) if before > 0 else 0.95
    return last * ratio / (1 - ratio)
