"""A basis of few rows: the Gram matrix of the features of all of them, block of columns by block of columns."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..basis import Basis
from ..weight_metric import BoundMetric
from .basis_job import FittedBasis, Job, column_sums, is_raw, reciprocal, resolved, stds, turn_signs
from .checkpoint import Saved
from .coefficients import Coefficients
from .dataset import ahead
from .ranks import Ranks

BLOCK_BYTES = 96 << 20  # of the columns that are held at a time
TILES = 8  # of the Gram matrix; above the diagonal they follow by symmetry


def by_gram(job: Job, saved: Saved) -> FittedBasis:
    """From the inner products of the features of all rows; a component is X^T u / |X^T u|."""
    sums = _gram_sums(job, saved)
    mean, raw = sums["mean"], sums["std"]
    std = stds(job, raw)
    bound = job.metric.at(mean, std)
    unit = float(std.abs().max()) if is_raw(job) else 1.0  # the sums were made without it
    scale = (bound.factor / unit) ** 2
    gram, energy = sums["gram"].mul_(scale), sums["energy"].mul_(scale)
    values, u = torch.linalg.eigh(gram[: job.n])  # reads the lower triangle
    values, u = values.flip(0)[: job.k].clamp_min(0), u.flip(1)[:, : job.k].contiguous()
    tiny = 1e-30 + 1e-14 * float(values[0])
    v, squares = _gram_components(job, u / values.clamp_min(tiny).sqrt(), mean, std, bound)
    signs = turn_signs(v)
    basis = job.basis(mean, std, v, squares * values / (job.n - 1))
    c = torch.empty(len(job.data), job.k)
    rest = gram[job.n :] @ u
    order = torch.cat([job.data.training_rows, job.data.heldout_rows])
    c[order] = ((job.n - 1) ** 0.5 * torch.cat([u, rest / values.clamp_min(tiny)])).float().cpu()
    energies = torch.empty(len(job.data), dtype=torch.float64)
    energies[order] = energy.cpu()
    coefficients = _coefficients(job, basis, c * signs, energies)
    how = {"route": "gram", "reads": 2, "exact": True}
    return job.finished(basis, coefficients, how)


def _gram_sums(job: Job, saved: Saved) -> dict[str, Tensor]:
    """gram [N, n] of all rows with the training rows (its lower triangle), energy [N] of all rows,
    both before the metric's factor, and mean and std [P]: one reading of the data.

    Ranks share the blocks of columns. Rows are in the order training, held out.
    """
    device, n, total = job.compute.device, job.n, len(job.data)
    order = torch.cat([job.data.training_rows, job.data.heldout_rows])
    blocks = _column_blocks(job, total)
    own = list(job.ranks.mine(range(len(blocks))))
    sums = {k: t.to(device) for k, t in saved.tensors.items()} or {
        "gram": torch.zeros(total, n, dtype=torch.float64, device=device),
        "energy": torch.zeros(total, dtype=torch.float64, device=device),
        "extra": torch.zeros(total, job.extra_columns, dtype=torch.float64, device=device),
        "mean": torch.zeros(job.p, dtype=torch.float64, device=device),
        "std": torch.zeros(job.p, dtype=torch.float64, device=device),
    }
    own = own[int(saved.numbers.get("blocks", 0)) :]
    done = int(saved.numbers.get("blocks", 0))
    for (start, stop), w in ahead((blocks[i], job.data.columns(order, *blocks[i])) for i in own):
        w = job.compute.put(w)
        mean, std = _column_moments(w[:n])
        sums["mean"][start:stop], sums["std"][start:stop] = mean, std
        x = _standardised_columns(job, w, mean, std)
        metric = job.metric.part(mean, std if not is_raw(job) else torch.ones_like(std), start)
        sums["extra"] += metric.extra(x, start)
        x = metric.local(x, start)
        sums["energy"] += torch.linalg.vecdot(x, x)
        with job.compute.products():
            _add_gram(sums["gram"], x, n)
        done += 1
        saved.keep(lambda: (sums, {"blocks": done}))  # noqa: B023
        job.callback(
            f"Gram matrix: {done} of {len(job.ranks.mine(range(len(blocks))))} blocks of columns"
        )
    for t in sums.values():
        job.ranks.sum(t)
    extra = sums["extra"]
    sums["energy"] += extra.square().sum(1)
    sums["gram"].addmm_(extra, extra[:n].T)
    return {**sums, "mean": sums["mean"].cpu(), "std": sums["std"].cpu()}


def _add_gram(gram: Tensor, x: Tensor, n: int) -> None:
    """gram [N, n] += x x[:n]^T for x [N, p], below the diagonal of the training rows only."""
    edges = [round(i * n / TILES) for i in range(TILES + 1)] + [len(x)]
    for first, last in pairwise(edges):
        width = min(last, n)
        gram[first:last, :width] += x[first:last] @ x[:width].T


def _gram_components(
    job: Job, u: Tensor, mean: Tensor, std: Tensor, bound: BoundMetric
) -> tuple[Tensor, Tensor]:
    """Components [K, P] in half precision, X^T u for u [n, K], and their squared lengths [K] under the
    metric: the second reading of the data."""
    device, k = job.compute.device, job.k
    blocks = _column_blocks(job, job.n)
    owner = [r for r in range(job.ranks.size) for _ in Ranks(r, job.ranks.size).mine(blocks)]
    own = [i for i, r in enumerate(owner) if r == job.ranks.rank]
    v = torch.zeros(k, job.p, dtype=torch.float16)
    squares = torch.zeros(k, dtype=torch.float64, device=device)
    extra = torch.zeros(k, bound.extra_columns, dtype=torch.float64, device=device)
    bound, turn = bound.to(device), u.T.float().contiguous()
    rows = job.data.training_rows
    for (start, stop), w in ahead((blocks[i], job.data.columns(rows, *blocks[i])) for i in own):
        x = job.compute.put(w).sub_(mean[start:stop].to(device, torch.float32))
        x.mul_(reciprocal(std[start:stop]).to(device, torch.float32))
        with job.compute.products():
            part = (turn @ x).float()
        features = bound.local(part, start)
        squares += torch.linalg.vecdot(features, features)
        extra += bound.extra(part, start)
        v[:, start:stop] = part.half().cpu()
    squares = job.ranks.sum(squares) + job.ranks.sum(extra).square().sum(1)
    for (start, stop), r in zip(blocks, owner):
        v[:, start:stop] = job.ranks.share(v[:, start:stop].contiguous(), r)
    return v, squares


def _column_blocks(job: Job, rows: int) -> list[tuple[int, int]]:
    """(start, stop) of columns that are held at a time, between edges of the metric; at least as many
    as there are ranks, if the metric allows."""
    edges = job.metric.edges(job.p)
    width = max(1, BLOCK_BYTES // (4 * rows))
    width = min(width, -(-job.p // job.ranks.size))
    blocks, start = [], 0
    for before, edge in zip(edges, [*edges[1:], job.p]):
        if edge - start > width and before > start:
            blocks.append((start, before))
            start = before
    blocks.append((start, job.p))
    return blocks


def _column_moments(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [p] of columns w [n, p], in double precision and two passes over what is held."""
    mean = column_sums(w) / len(w)
    rest = w - mean.float()
    off = column_sums(rest) / len(w)  # what rounding the mean left
    squares = column_sums(rest.square_()) - len(w) * off.square()
    return mean, resolved(squares, mean, len(w))


def _standardised_columns(job: Job, w: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In place."""
    w.sub_(mean.float())
    return w if is_raw(job) else w.mul_(reciprocal(std).float())


def _coefficients(job: Job, basis: Basis, c: Tensor, energy: Tensor) -> Coefficients:
    """c [N, K] and energy [N] of all rows -> what `project_dataset` gives."""
    inside = (c.double() * basis.singular_values.double()).square().sum(1)
    outside = (energy - inside).clamp_min(0).float()
    data = job.data
    return Coefficients(data.layout, c, outside, data.identity, data.heldout, dict(data.provenance))
