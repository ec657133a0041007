"""A basis of few parameters: their second moments, turned to those of features afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weight_metric import BoundMetric, Plain
from .basis_job import (
    FittedBasis,
    Job,
    column_sums,
    reciprocal,
    resolved,
    shared_origin,
    stds,
    turn_signs,
)
from .checkpoint import Saved


def by_covariance(job: Job, saved: Saved) -> FittedBasis:
    """From the second moments of all columns, turned to features afterwards: one reading, and one for
    the coefficients."""
    mean, covariance = _second_moments(job, saved)
    std = stds(job, resolved(covariance.diagonal() * (job.n - 1), mean, job.n).cpu())
    bound = job.metric.at(mean.cpu(), std).to(job.compute.device)
    inverse = reciprocal(std.to(covariance))
    c = covariance.mul_(inverse).mul_(inverse[:, None])
    plain = isinstance(job.metric, Plain)
    half = c if plain else _features(bound, c).T  # [P + m, P]
    square = c if plain else _features(bound, half).double()
    values, v = torch.linalg.eigh(square)
    values, v = values.flip(0)[: job.k].clamp_min(0), v.flip(1)[:, : job.k].T
    if not plain:
        v = (v @ half.double()) / values.clamp_min(1e-300)[:, None]
    v = v.half().cpu()
    turn_signs(v)
    basis = job.basis(mean.cpu(), std, v, values)
    return job.finished(basis, None, {"route": "covariance", "reads": 2, "exact": True})


def _second_moments(job: Job, saved: Saved) -> tuple[Tensor, Tensor]:
    """Mean [P] and covariance [P, P], from single-precision products about the first chunk's mean."""
    device, n, p = job.compute.device, job.n, job.p
    origin = shared_origin(job)
    sums = {k: t.to(device) for k, t in saved.tensors.items()} or {
        "sum": torch.zeros(p, dtype=torch.float64, device=device),
        "products": torch.zeros(p, p, dtype=torch.float64, device=device),
    }
    first = int(saved.numbers.get("chunks", 0))
    for i, w in enumerate(job.chunks(job.data.training_rows)):
        if i < first:
            continue
        x = job.compute.put(w).sub_(origin)
        sums["sum"] += column_sums(x)
        with job.compute.products():
            sums["products"] += x.T @ x
        if job.ranks.size == 1:
            saved.keep(lambda: (sums, {"chunks": i + 1}))  # noqa: B023
    for t in sums.values():
        job.ranks.sum(t)
    off = sums["sum"] / n
    covariance = sums["products"].addr_(off, off, alpha=-n).div_(n - 1)
    return origin.double() + off, covariance


def _features(bound: BoundMetric, rows: Tensor) -> Tensor:
    """All features [B, P + m] of rows [B, P], in single precision."""
    rows = rows.float()
    return torch.cat([bound.local(rows), bound.extra(rows)], 1)
