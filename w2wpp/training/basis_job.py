"""What every route to a basis shares: the job, what comes out of it, and sums in double precision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis, without_tiny
from ..errors import DataError
from ..weight_metric import Metric, Plain
from .coefficients import Coefficients, project_dataset
from .compute import Compute
from .dataset import VectorDataset, ahead
from .ranks import Ranks

SUMMED = 64  # rows that are added up in single precision, before their sums are in double
Callback = Callable[[str], object]  # a line on what is going on


class SpanError(DataError):
    """The training rows span fewer directions than there are to be components."""

    def __init__(self, span: int) -> None:
        self.span = span  # directions
        super().__init__(
            f"The training rows span only {span} directions. Choose at most that many components."
        )


@dataclass(frozen=True, eq=False)
class FittedBasis:
    """A basis, the coefficients of the data set that it was made from, and how it was found."""

    basis: Basis
    coefficients: Coefficients
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """A data set [N, P] whose training rows [n, P] are to get k components under a metric, and the means."""

    data: VectorDataset
    k: int
    metric: Metric
    compute: Compute
    ranks: Ranks
    callback: Callback
    tolerance: float
    max_iterations: int
    exact_limit: int

    @property
    def n(self) -> int:
        """Training rows."""
        return len(self.data.training_rows)

    @property
    def p(self) -> int:
        """Parameters."""
        return self.data.layout.size

    @property
    def extra_columns(self) -> int:
        """Features of the metric that no single parameter has."""
        nothing = torch.zeros(0)
        return self.metric.part(nothing, nothing, 0).extra_columns

    def digest(self) -> str:
        """Names a run: settings and data. A checkpoint of another run must not be taken up."""
        settings = (self.k, self.tolerance, self.max_iterations, self.exact_limit, self.ranks.size)
        digest = hashlib.sha256(repr((settings, self.compute, self.metric.config())).encode())
        for t in (self.data.heldout, self.data.identity, *self.metric.tensors().values()):
            digest.update(t.contiguous().view(torch.uint8).numpy().data)
        for row in {0, len(self.data) // 2, len(self.data) - 1}:
            digest.update(self.data.vectors([row]).numpy().data)
        return digest.hexdigest()

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """This rank's part of some rows, read ahead: each is the caller's until the next one is asked for."""
        return (w for _, w in ahead(self.data.chunks(self.ranks.mine(rows), buffers=2)))

    def finished(self, basis: Basis, c: Coefficients | None, how: dict[str, Any]) -> FittedBasis:
        """The result with its report; coefficients that are not known yet are computed, in one reading."""
        if c is None:
            c = project_dataset(self.data, basis, compute=self.compute, ranks=self.ranks)
        report = {
            "metric": self.metric.name,
            **how,
            "captured_variance": float(basis.singular_values.double().square().sum()),
            **self.compute.to_json(),
        }
        if self.ranks.size > 1:
            report["processes"] = self.ranks.size
        return FittedBasis(basis, c, report)

    def basis(self, mean: Tensor, std: Tensor, v: Tensor, variances: Tensor) -> Basis:
        """Of mean and std [P], v [K, P] in half precision and variances [K]; checked, and on the CPU.

        Raises SpanError if the rows span fewer directions.
        """
        variances = variances.cpu()
        rank = int((variances > 1e-10 * variances[0].clamp_min(1e-300)).sum())
        if rank < self.k:
            raise SpanError(rank)
        return Basis(mean, std, v, variances.sqrt(), metric=self.metric)


def stds(job: Job, std: Tensor) -> Tensor:
    """[P] by which vectors are divided."""
    if isinstance(job.metric, Plain) and job.metric.name == "raw":
        std = torch.full_like(std, float(std.square().mean().sqrt()))
    return without_tiny(std)


def is_raw(job: Job) -> bool:
    """Whether numbers count as they are, so that nothing is divided by before the end."""
    return isinstance(job.metric, Plain) and job.metric.name == "raw"


def reciprocal(std: Tensor) -> Tensor:
    """1 / std [P], and 0 where a parameter never varies."""
    return torch.where(std == 0, 0.0, 1.0 / std)


def column_sums(x: Tensor) -> Tensor:
    """[p] of x [n, p], in double precision from sums of few rows: a double copy of x would cost more than all else."""
    return torch.stack([part.sum(0) for part in x.split(SUMMED)]).sum(0, dtype=torch.float64)


def resolved(squares: Tensor, mean: Tensor, n: int) -> Tensor:
    """Standard deviations [p] from sums of squares about the mean; zero where single precision can't tell."""
    std = (squares / (n - 1)).clamp_min(0).sqrt()
    return torch.where(std > 2e-7 * mean.abs(), std, 0.0)


def shared_origin(job: Job) -> Tensor:
    """[P] near the mean, the same on every rank: the mean of the first few rows."""
    first = job.data.vectors(job.data.training_rows[:32])
    return job.ranks.share(first.double().mean(0).float().to(job.compute.device))


def turn_signs(v: Tensor) -> Tensor:
    """Turn components [K, P], in place, so that their largest entry is positive, since eigenvectors come
    with either sign. Returns the signs [K]."""
    signs = torch.ones(len(v))
    for rows, part in zip(signs.split(256), v.split(256)):
        largest = part.gather(1, part.abs().argmax(dim=1, keepdim=True))
        rows.copy_(torch.where(largest[:, 0] < 0, -1.0, 1.0))
        part.mul_(rows[:, None].to(part))
    return signs
