"""A basis of many rows and many parameters: block Lanczos, one reading of the data an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..metrics import ColumnSums
from ..weight_metric import Plain
from .basis_job import (
    FittedBasis,
    Job,
    SpanError,
    reciprocal,
    resolved,
    shared_origin,
    stds,
    turn_signs,
)
from .checkpoint import Saved
from .coefficients import Coefficients, project_dataset
from .krylov import BlockLanczos, Convergence


def by_iteration(job: Job, saved: Saved) -> FittedBasis:
    """Block Lanczos on the covariance, with products X^T (X G q).

    Raises SpanError if the rows span fewer directions than are asked for.
    """
    if "mean" in saved.tensors:
        mean, raw = saved.tensors["mean"], saved.tensors["std"]
    else:
        mean, raw = _moments(job)
    std = stds(job, raw)
    device, k = job.compute.device, job.k
    bound = job.metric.at(mean, std).to(device)
    rows = _Rows(job, mean.float().to(device), reciprocal(std).float().to(device))
    plain = isinstance(job.metric, Plain)
    block = max(min(32, k), min(k // 2, 1000))
    lanczos = BlockLanczos(
        k=k,
        size=job.p,
        block=block,
        limit=max(k + 4 * block, k * 3 // 2, min(4 * k + 4 * block, 16000)),
        tolerance=job.tolerance,
        apply=rows.covariance_times,
        dual=(lambda q: q) if plain else (lambda q: bound.gram(q.T).T),
        device=device,
    )
    if "mean" in saved.tensors:
        lanczos.load(saved.tensors, saved.numbers)
    else:
        lanczos.start()
    _iterate(job, lanczos, saved, {"mean": mean, "std": raw})
    found = lanczos.convergence
    values, vectors = lanczos.finish()
    if len(values) < k:
        raise SpanError(len(values))
    v = vectors.T.half().cpu()
    turn_signs(v)
    basis = job.basis(mean, std, v, values)
    c = project_dataset(job.data, basis, compute=job.compute, ranks=job.ranks)
    reads = 2 + found.iterations
    return job.finished(
        *_whitened(job, basis, c),
        {"route": "iteration", "reads": reads, "exact": False, **found.to_json()},
    )


def _iterate(job: Job, lanczos: BlockLanczos, saved: Saved, moments: dict[str, Tensor]) -> None:
    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = lanczos.state()
        return {**tensors, **moments}, numbers

    while True:
        found: Convergence = lanczos.convergence
        if found.converged or found.iterations >= job.max_iterations:
            break
        lanczos.step()
        job.callback(f"iteration {lanczos.iterations}: {lanczos.convergence}")
        if job.ranks.is_writer:
            saved.keep(state)


def _whitened(job: Job, basis: Basis, c: Coefficients) -> tuple[Basis, Coefficients]:
    """Singular values as what they mean: the std of each coefficient over the training rows."""
    factor = c.values[~c.heldout].double().square().sum(0).div(job.n - 1).sqrt().float()
    exact = Basis(
        basis.mean,
        basis.std,
        basis.components,
        basis.singular_values * factor,
        metric=basis.metric,
    )
    return exact, replace(c, values=c.values / factor)


@dataclass(eq=False)
class _Rows:
    """This rank's training rows, standardised, as often as asked for. A GPU keeps them if they fit."""

    job: Job
    mean: Tensor
    inverse: Tensor
    kept: list[Tensor] = field(default_factory=list)
    whole: bool = False

    def covariance_times(self, q: Tensor) -> Tensor:
        """X^T (X q) / (n - 1) for q [P, b]: one pass; sums of eight chunks are added up in double."""
        total = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        part, q = torch.zeros_like(q), q.contiguous()
        for i, x in enumerate(self, 1):
            with self.job.compute.products():
                part += x.T @ (x @ q)
            if i % 8 == 0:
                total += part
                part.zero_()
        total += part
        return (self.job.ranks.sum(total) / (self.job.n - 1)).to(q.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        if self.whole:
            yield from ((w - self.mean) * self.inverse for w in self.kept)
            return
        keep = self._fits()
        for w in self.job.chunks(self.job.data.training_rows):
            w = self.job.compute.put(w)
            if keep:
                self.kept.append(w)
                yield (w - self.mean) * self.inverse
            else:
                yield w.sub_(self.mean).mul_(self.inverse)
        self.whole = keep

    def _fits(self) -> bool:
        if self.job.compute.device.type != "cuda":
            return False  # the system's file cache does that
        free, _ = torch.cuda.mem_get_info(self.job.compute.device)
        return 4 * self.job.p * len(self.job.ranks.mine(self.job.data.training_rows)) < free // 2


def _moments(job: Job) -> tuple[Tensor, Tensor]:
    """Mean and std [P], sums about the first chunk's mean in double precision; one reading."""
    sums = ColumnSums(shared_origin(job))
    for w in job.chunks(job.data.training_rows):
        sums.add(job.compute.put(w))
    job.ranks.sum(sums.total)
    job.ranks.sum(sums.squares)
    mean, squares = sums.about_the_mean(job.n)
    return mean.cpu(), resolved(squares, mean, job.n).cpu()
