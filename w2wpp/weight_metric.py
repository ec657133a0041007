"""Metrics on LoRA vectors: what a principal component analysis minimises, and encoding solves for.

A metric is a quadratic form on differences of vectors. It is applied to standardised differences
x [B, P] (see `Basis.standardise`) through features: a linear map f with |f(x)|^2 = <x, x>. Features
are as many numbers as parameters, in the same places, and may be followed by extra columns.

parameter  every number in units of its std: weights2weights (Dravid et al. 2024)
raw        every number in one unit
update     |dW|^2 of the update W = B A, linearised at the mean LoRA: what a difference does to the
           model's matrices. Scales and gauges of A and B mean nothing to it.
sketch     sampled rows of a Jacobian beside scaled numbers: a Gauss-Newton metric of any function
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigError, FormatError, ShapeError
from .lora.layout import Layout, Module


class Metric(Protocol):
    """A metric before mean and stds are known."""

    @property
    def name(self) -> str:
        """As files and the command line call it."""

    def at(self, mean: Tensor, std: Tensor) -> BoundMetric:
        """The metric on differences in units of std [P] about mean [P]."""
        ...

    def part(self, mean: Tensor, std: Tensor, start: int) -> BoundMetric:
        """The same for some columns that begin at `start`, of which alone mean and std [n] are known;
        short of a `factor` that only all columns tell."""
        ...

    def edges(self, size: int) -> list[int]:
        """Places, 0 and P among them, between which features do not mix columns."""
        ...

    def config(self) -> dict[str, Any]:
        """The JSON that stands for it in a file."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors beside that."""


class BoundMetric:
    """The plain metric, |x|^2, and what others override. All maps act on rows x [B, P]."""

    extra_columns = 0
    factor = 1.0  # that features have beyond those of a `part`

    def __init__(self, size: int) -> None:
        self.size = size  # P

    def local(self, x: Tensor, start: int = 0) -> Tensor:
        """Features of columns x [B, n] that stand at `start`, between two edges: [B, n]."""
        return x

    def extra(self, x: Tensor, start: int = 0) -> Tensor:
        """What columns x [B, n] at `start` add to the extra columns: [B, extra_columns]."""
        return x.new_zeros(len(x), 0)

    def gram(self, x: Tensor) -> Tensor:
        """G x, so that <y, x> = y . G x: [B, P]."""
        return x

    def energy(self, x: Tensor) -> Tensor:
        """<x, x> in double precision: [B]."""
        squares = self.local(x).square().sum(1, dtype=torch.float64)
        return squares + self.extra(x).square().sum(1, dtype=torch.float64)

    def to(self, device: torch.device | str) -> BoundMetric:
        """The same on a device."""
        return self


@dataclass(frozen=True)
class Plain:
    """`parameter` and `raw`: the stds [P] by which vectors are divided say all."""

    name: str = "parameter"

    def at(self, mean: Tensor, std: Tensor) -> BoundMetric:
        return BoundMetric(len(std))

    def part(self, mean: Tensor, std: Tensor, start: int) -> BoundMetric:
        return BoundMetric(len(std))

    def edges(self, size: int) -> list[int]:
        return [*range(0, size, EDGE), size]

    def config(self) -> dict[str, Any]:
        return {"name": self.name}

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class UpdateMetric:
    """sum over modules of |dB A0 + B0 dA|^2, for the mean LoRA's A0 [r, in] and B0 [out, r].

    With P the projection on the columns of B0, dB A0 + B0 dA falls into two orthogonal parts,
    (1 - P) dB A0 and B0 (dA + B0^+ dB A0). So the features are (A0 A0^T)^(1/2) times the first and
    (B0^T B0)^(1/2) times the second, and no extra columns are needed for the coupling of A and B.
    The whole is divided by its mean over the stds, so that features have variance near one.
    """

    layout: Layout
    name: str = field(default="update", init=False)

    def at(self, mean: Tensor, std: Tensor) -> BoundMetric:
        if not len(mean) == len(std) == self.layout.size:
            raise ShapeError(
                f"The update metric of layout '{self.layout.name}' needs mean and std "
                f"[{self.layout.size}]. Got [{len(mean)}] and [{len(std)}]."
            )
        return _BoundUpdate(self.layout, mean, std, 0).normalised()

    def part(self, mean: Tensor, std: Tensor, start: int) -> BoundMetric:
        return _BoundUpdate(self.layout, mean, std, start)

    def edges(self, size: int) -> list[int]:
        return [0, *(up.stop for _, _, up in self.layout.slices())]

    def config(self) -> dict[str, Any]:
        return {"name": self.name}

    def tensors(self) -> dict[str, Tensor]:
        return {}


class _BoundUpdate(BoundMetric):
    def __init__(self, layout: Layout, mean: Tensor, std: Tensor, start: int) -> None:
        super().__init__(len(std))
        stop = start + len(std)
        self.parts = [
            _UpdatePart.of(
                module,
                layout.rank,
                down.start,
                mean[down.start - start : up.stop - start],
                std[down.start - start : up.stop - start],
            )
            for module, down, up in layout.slices()
            if start <= down.start and up.stop <= stop
        ]

    def normalised(self) -> _BoundUpdate:
        """Divided so that uncorrelated numbers of these stds have <x, x> = P in the mean."""
        total = sum(p.trace for p in self.parts)
        if not total > 0:
            raise ConfigError(
                "The mean LoRA has no update (all of its A or all of its B are zero, or nothing "
                "varies), so there is no update metric about it. Use --metric parameter."
            )
        self.factor = (self.size / total) ** 0.5
        self.parts = [p.scaled(self.factor) for p in self.parts]
        return self

    def local(self, x: Tensor, start: int = 0) -> Tensor:
        out = torch.empty_like(x)
        for p, columns in self._within(x, start):
            p.features(x[:, columns], out[:, columns])
        return out

    def gram(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for p, columns in self._within(x, 0):
            p.gram(x[:, columns], out[:, columns])
        return out

    def to(self, device: torch.device | str) -> BoundMetric:
        moved = copy.copy(self)
        moved.parts = [p.to(device) for p in self.parts]
        return moved

    def _within(self, x: Tensor, start: int) -> Iterator[tuple[_UpdatePart, slice]]:
        stop = start + x.shape[1]
        inside = [p for p in self.parts if start <= p.start < stop]
        if not inside or inside[0].start != start or inside[-1].stop != stop:
            raise ShapeError(f"Columns {start} to {stop} cut through a module of the layout.")
        for p in inside:
            yield p, slice(p.start - start, p.stop - start)


@dataclass(frozen=True, eq=False)
class _UpdatePart:
    """One module. Letters: r rank, i inputs, o outputs; A and B are flattened in this order."""

    start: int
    middle: int
    stop: int
    rank: int
    unit_a: Tensor  # [r, i] stds
    unit_b: Tensor  # [o, r]
    root_a: Tensor  # [r, r] (A0 A0^T)^(1/2)
    root_b: Tensor  # [r, r] (B0^T B0)^(1/2)
    columns: Tensor  # [o, r] orthonormal columns that span B0's, zero where B0 lacks rank
    inverse: Tensor  # [r, o] pseudo-inverse of B0
    a0: Tensor  # [r, i]
    trace: float  # mean <x, x> of uncorrelated standardised numbers, unscaled

    @classmethod
    def of(cls, module: Module, rank: int, start: int, mean: Tensor, std: Tensor) -> _UpdatePart:
        """From the module's part of mean and stds."""
        middle = start + rank * module.in_features
        stop = middle + rank * module.out_features
        n = middle - start
        a0, ua = (t[:n].double().unflatten(0, (rank, -1)) for t in (mean, std))
        b0, ub = (t[n:].double().unflatten(0, (-1, rank)) for t in (mean, std))
        u, s, vt = torch.linalg.svd(b0, full_matrices=False)
        keep = (s > 1e-6 * s.max()).to(s) if bool(s.max() > 0) else torch.zeros_like(s)
        columns = u * keep
        inverse = (vt.T * torch.where(keep > 0, 1.0 / s.clamp_min(1e-300), 0.0)) @ u.T
        gram_a, gram_b = a0 @ a0.T, b0.T @ b0
        # mean of |dB A0|^2 and |B0 dA|^2 when every number moves by its std, independently
        trace = (ub.square() @ gram_a.diagonal()).sum() + (gram_b.diagonal() @ ua.square()).sum()
        roots = (_root(gram_a), _root(gram_b))
        floats = [t.float() for t in (ua, ub, *roots, columns, inverse, a0)]
        return cls(start, middle, stop, rank, *floats, trace=float(trace))  # type: ignore[misc, arg-type]

    def scaled(self, factor: float) -> _UpdatePart:
        return replace(self, root_a=self.root_a * factor, root_b=self.root_b * factor)

    def to(self, device: torch.device | str) -> _UpdatePart:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def features(self, x: Tensor, out: Tensor) -> None:
        """Of the module's columns x [B, n], into out [B, n]."""
        a, b = self._matrices(x)
        a, b = a * self.unit_a, b * self.unit_b
        within = self.columns.T @ b  # [B, r, r]
        outside = b - self.columns @ within
        moved = a + (self.inverse @ b) @ self.a0
        out_a, out_b = self._matrices(out)
        out_a.copy_(self.root_b @ moved)
        out_b.copy_(outside @ self.root_a)

    def gram(self, x: Tensor, out: Tensor) -> None:
        """f^T f x: the map above and its transpose."""
        self.features(x, out)
        out_a, out_b = self._matrices(out)
        moved = self.root_b @ out_a  # the roots are symmetric
        outside = out_b @ self.root_a
        b = outside - self.columns @ (self.columns.T @ outside)
        b = b + self.inverse.T @ (moved @ self.a0.T)
        out_a.copy_(moved * self.unit_a)
        out_b.copy_(b * self.unit_b)

    def _matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A [B, r, i] and B [B, o, r] as views of the module's columns."""
        n = self.middle - self.start
        a, b = x[:, :n].unflatten(1, (self.rank, -1)), x[:, n:].unflatten(1, (-1, self.rank))
        return a, b


@dataclass(frozen=True, eq=False)
class SketchMetric:
    """<d, d> = |scale * d|^2 + |rows d|^2 on differences d of vectors (not standardised).

    scale [P]; rows [n, P]: Jacobian rows of what is to be preserved, for instance the outputs of a
    model. Files keep both, the rows in half precision.
    """

    scale: Tensor
    rows: Tensor
    name: str = "sketch"

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.scale.shape != self.rows.shape[1:]:
            raise ShapeError(
                f"A sketch has scale [P] and rows [n, P]. Got {list(self.scale.shape)} and "
                f"{list(self.rows.shape)}."
            )

    def at(self, mean: Tensor, std: Tensor) -> BoundMetric:
        return self.part(mean, std, 0)

    def part(self, mean: Tensor, std: Tensor, start: int) -> BoundMetric:
        columns = slice(start, start + len(std))
        # Half precision is what files keep, so it is what counts from the beginning.
        rows = self.rows[:, columns].half().to(std.device, torch.float32)
        scale = self.scale[columns].to(std.device, torch.float32)
        return _BoundSketch(scale * std.float(), rows * std.float(), start)

    def edges(self, size: int) -> list[int]:
        return [*range(0, size, EDGE), size]

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "rows": len(self.rows)}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale.float(), "rows": self.rows.half()}


class _BoundSketch(BoundMetric):
    """scale [n] and rows [m, n] of the columns from `first` on, per standardised number."""

    def __init__(self, scale: Tensor, rows: Tensor, first: int) -> None:
        super().__init__(len(scale))
        self.scale, self.rows, self.first = scale, rows, first
        self.extra_columns = len(rows)

    def local(self, x: Tensor, start: int = 0) -> Tensor:
        return x * self.scale[self._within(x, start)]

    def extra(self, x: Tensor, start: int = 0) -> Tensor:
        return x @ self.rows[:, self._within(x, start)].T

    def gram(self, x: Tensor) -> Tensor:
        return torch.addmm(x * self.scale.square(), x @ self.rows.T, self.rows)

    def to(self, device: torch.device | str) -> BoundMetric:
        return _BoundSketch(self.scale.to(device), self.rows.to(device), self.first)

    def _within(self, x: Tensor, start: int) -> slice:
        return slice(start - self.first, start - self.first + x.shape[1])


EDGE = 1024  # columns of a block, where any number may begin one
METRICS = ("parameter", "raw", "update")


def named_metric(name: str, layout: Layout) -> Metric:
    """One of METRICS, for vectors of a layout. Raises ConfigError for another name."""
    if name not in METRICS:
        raise ConfigError(f"The metric is one of {', '.join(METRICS)}. Got {name!r}.")
    return UpdateMetric(layout) if name == "update" else Plain(name)


def metric_from(config: Mapping[str, Any], layout: Layout, tensors: Mapping[str, Tensor]) -> Metric:
    """The metric that a file describes; `tensors` are those that `Metric.tensors` gave.

    Raises FormatError for a metric that this release does not know.
    """
    name = str(config.get("name", ""))
    if {"scale", "rows"} <= set(tensors):
        return SketchMetric(tensors["scale"], tensors["rows"], name)
    if name not in METRICS:
        raise FormatError(
            f"This release knows the metrics {', '.join(METRICS)}, not {name!r}. Update w2wpp."
        )
    return named_metric(name, layout)


def _root(gram: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix [r, r]."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
