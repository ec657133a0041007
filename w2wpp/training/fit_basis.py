"""PCA of a data set of vectors, streamed: what weights2weights does before anything else.

Few rows: the Gram matrix of the features of all rows, block of columns by block of columns; the
data are read twice. Few parameters: their covariance; read twice. Both large: block Lanczos, one
reading an iteration beside one for mean and stds and one for the coefficients. Vectors are
single precision; what is summed over them is added up in double.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis, without_tiny
from ..errors import ConfigError, DataError
from ..metrics import ColumnSums
from ..weight_metric import BoundMetric, Metric, Plain, named_metric
from .checkpoint import Saved
from .coefficients import Coefficients, project_dataset
from .compute import Compute, explained
from .dataset import VectorDataset, ahead
from .krylov import BlockLanczos, Convergence
from .ranks import Ranks, current_ranks

STANDARDISE = {"parameter": "parameter", "global": "raw"}  # older name of two metrics
EXACT_LIMIT = 8192  # rows of the largest matrix to diagonalise; beyond it, block Lanczos
BLOCK_BYTES = 96 << 20  # of the columns that the Gram route holds at a time
SUMMED = 64  # rows that are added up in single precision, before their sums are in double
TILES = 8  # of the Gram matrix; above the diagonal they follow by symmetry
TOLERANCE = 1e-4  # share of the captured variance that an iteration may lose
ITERATIONS = 60
ADVICE = "Choose fewer --components, use fewer rows, or a machine with more memory; --device cpu streams from disk."


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


Callback = Callable[[str], object]  # a line on what is going on


def fit_basis(dataset: VectorDataset, components: int, **options: Any) -> Basis:
    """The leading principal components of the training rows. Held-out rows are never looked at.

    Options as of `fit_coefficients`.
    """
    return fit_coefficients(dataset, components, **options).basis


def fit_coefficients(
    dataset: VectorDataset,
    components: int,
    *,
    metric: str | Metric | None = None,
    standardise: str | None = None,
    exact_limit: int = EXACT_LIMIT,
    tolerance: float = TOLERANCE,
    max_iterations: int = ITERATIONS,
    compute: Compute | None = None,
    ranks: Ranks | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callback = lambda line: None,
) -> FittedBasis:
    """Principal components of the training rows under a metric (`weight_metric`; by default
    "update"), with the coefficients of all rows.

    With at most `exact_limit` training rows or parameters the result is exact to single precision.
    Otherwise an estimated `tolerance` of the captured variance may be lost, and singular values
    may be off by 2.5 times that; the report says what was reached. Under `torchrun` ranks share
    the rows. With a checkpoint path the work is saved there and taken up again; same bits.
    `standardise` is the older name of two metrics: "parameter", and "global" for "raw".

    Raises ConfigError for more components than the rows support, and for a tolerance or number of iterations out of
    range.
    """
    metric = _metric(dataset, metric, standardise)
    n, p = len(dataset.training_rows), dataset.layout.size
    if not 1 <= components <= min(n - 1, p):
        raise ConfigError(
            f"{n} training rows of {p} parameters support 1 to {min(n - 1, p)} components. Got "
            f"{components}."
        )
    if not 0 < tolerance < 1 or max_iterations < 1:
        raise ConfigError(
            f"The tolerance lies between 0 and 1, iterations are 1 or more. Got {tolerance} and "
            f"{max_iterations}."
        )
    job = _Job(
        dataset,
        components,
        metric,
        compute or Compute.pick("cpu"),
        ranks or current_ranks(),
        callback,
        tolerance,
        max_iterations,
        exact_limit,
    )
    by_gram = n <= max(exact_limit, 2 * components) and n < p
    route = _by_gram if by_gram else _by_covariance if p <= exact_limit else _by_iteration
    if checkpoint is not None and job.ranks.rank and route is not _by_iteration:
        checkpoint = f"{os.fspath(checkpoint)}.rank{job.ranks.rank}"  # each has sums of its own
    with explained(ADVICE), torch.no_grad():
        return route(job, Saved(checkpoint, job.digest()))


@dataclass(frozen=True, eq=False)
class _Job:
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
        return len(self.data.training_rows)

    @property
    def p(self) -> int:
        return self.data.layout.size

    @property
    def extra_columns(self) -> int:
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
        """This rank's part of some rows, read ahead."""
        return (w for _, w in ahead(self.data.chunks(self.ranks.mine(rows))))

    def finished(self, basis: Basis, c: Coefficients | None, how: dict[str, Any]) -> FittedBasis:
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
        """Checked, and on the CPU. v [K, P] in half precision."""
        variances = variances.cpu()
        rank = int((variances > 1e-10 * variances[0].clamp_min(1e-300)).sum())
        if rank < self.k:
            raise SpanError(rank)
        return Basis(mean, std, v, variances.sqrt(), metric=self.metric)


def _metric(dataset: VectorDataset, metric: str | Metric | None, standardise: str | None) -> Metric:
    if standardise is not None:
        if standardise not in STANDARDISE:
            raise ConfigError(
                f"Vectors are standardised per {' or '.join(STANDARDISE)}. Got {standardise!r}."
            )
        if metric is not None and metric != STANDARDISE[standardise]:
            raise ConfigError(
                f"standardise={standardise!r} means the metric {STANDARDISE[standardise]!r}; give one "
                f"of them. Got metric={metric!r} too."
            )
        metric = STANDARDISE[standardise]
    if metric is None:
        metric = "update"
    return named_metric(metric, dataset.layout) if isinstance(metric, str) else metric


def _stds(job: _Job, std: Tensor) -> Tensor:
    """[P] by which vectors are divided."""
    if isinstance(job.metric, Plain) and job.metric.name == "raw":
        std = torch.full_like(std, float(std.square().mean().sqrt()))
    return without_tiny(std)


# --- few rows ------------------------------------------------------------------------------------


def _by_gram(job: _Job, saved: Saved) -> FittedBasis:
    """From the inner products of the features of all rows; a component is X^T u / |X^T u|."""
    sums = _gram_sums(job, saved)
    mean, raw = sums["mean"], sums["std"]
    std = _stds(job, raw)
    bound = job.metric.at(mean, std)
    unit = float(std.abs().max()) if _is_raw(job) else 1.0  # the sums were made without it
    scale = (bound.factor / unit) ** 2
    gram, energy = sums["gram"].mul_(scale), sums["energy"].mul_(scale)
    values, u = torch.linalg.eigh(gram[: job.n])  # reads the lower triangle
    values, u = values.flip(0)[: job.k].clamp_min(0), u.flip(1)[:, : job.k].contiguous()
    tiny = 1e-30 + 1e-14 * float(values[0])
    v, squares = _gram_components(job, u / values.clamp_min(tiny).sqrt(), mean, std, bound)
    signs = _sign(v)
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


def _gram_sums(job: _Job, saved: Saved) -> dict[str, Tensor]:
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
        metric = job.metric.part(mean, std if not _is_raw(job) else torch.ones_like(std), start)
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
    job: _Job, u: Tensor, mean: Tensor, std: Tensor, bound: BoundMetric
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
        x.mul_(_inverse(std[start:stop]).to(device, torch.float32))
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


def _column_blocks(job: _Job, rows: int) -> list[tuple[int, int]]:
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
    mean = _column_sums(w) / len(w)
    rest = w - mean.float()
    off = _column_sums(rest) / len(w)  # what rounding the mean left
    squares = _column_sums(rest.square_()) - len(w) * off.square()
    return mean, _resolved(squares, mean, len(w))


def _column_sums(x: Tensor) -> Tensor:
    """[p] of x [n, p], in double precision from sums of few rows: a double copy of x would cost more than all else."""
    return torch.stack([part.sum(0) for part in x.split(SUMMED)]).sum(0, dtype=torch.float64)


def _resolved(squares: Tensor, mean: Tensor, n: int) -> Tensor:
    """Standard deviations [p] from sums of squares about the mean; zero where single precision can't tell."""
    std = (squares / (n - 1)).clamp_min(0).sqrt()
    return torch.where(std > 2e-7 * mean.abs(), std, 0.0)


def _standardised_columns(job: _Job, w: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In place."""
    w.sub_(mean.float())
    return w if _is_raw(job) else w.mul_(_inverse(std).float())


def _is_raw(job: _Job) -> bool:
    return isinstance(job.metric, Plain) and job.metric.name == "raw"


def _inverse(std: Tensor) -> Tensor:
    return torch.where(std == 0, 0.0, 1.0 / std)


def _coefficients(job: _Job, basis: Basis, c: Tensor, energy: Tensor) -> Coefficients:
    """c [N, K] and energy [N] of all rows -> what `project_dataset` gives."""
    inside = (c.double() * basis.singular_values.double()).square().sum(1)
    outside = (energy - inside).clamp_min(0).float()
    data = job.data
    return Coefficients(data.layout, c, outside, data.identity, data.heldout, dict(data.provenance))


# --- few parameters ------------------------------------------------------------------------------


def _by_covariance(job: _Job, saved: Saved) -> FittedBasis:
    """From the second moments of all columns, turned to features afterwards: one reading, and one for
    the coefficients."""
    mean, covariance = _second_moments(job, saved)
    std = _stds(job, _resolved(covariance.diagonal() * (job.n - 1), mean, job.n).cpu())
    bound = job.metric.at(mean.cpu(), std).to(job.compute.device)
    inverse = _inverse(std.to(covariance))
    c = covariance.mul_(inverse).mul_(inverse[:, None])
    plain = isinstance(job.metric, Plain)
    half = c if plain else _features(bound, c).T  # [P + m, P]
    square = c if plain else _features(bound, half).double()
    values, v = torch.linalg.eigh(square)
    values, v = values.flip(0)[: job.k].clamp_min(0), v.flip(1)[:, : job.k].T
    if not plain:
        v = (v @ half.double()) / values.clamp_min(1e-300)[:, None]
    v = v.half().cpu()
    _sign(v)
    basis = job.basis(mean.cpu(), std, v, values)
    return job.finished(basis, None, {"route": "covariance", "reads": 2, "exact": True})


def _second_moments(job: _Job, saved: Saved) -> tuple[Tensor, Tensor]:
    """Mean [P] and covariance [P, P], from single-precision products about the first chunk's mean."""
    device, n, p = job.compute.device, job.n, job.p
    origin = _origin(job)
    sums = {k: t.to(device) for k, t in saved.tensors.items()} or {
        "sum": torch.zeros(p, dtype=torch.float64, device=device),
        "products": torch.zeros(p, p, dtype=torch.float64, device=device),
    }
    first = int(saved.numbers.get("chunks", 0))
    for i, w in enumerate(job.chunks(job.data.training_rows)):
        if i < first:
            continue
        x = job.compute.put(w) - origin
        sums["sum"] += _column_sums(x)
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


# --- both large ----------------------------------------------------------------------------------


def _by_iteration(job: _Job, saved: Saved) -> FittedBasis:
    """Block Lanczos on the covariance, with products X^T (X G q)."""
    if "mean" in saved.tensors:
        mean, raw = saved.tensors["mean"], saved.tensors["std"]
    else:
        mean, raw = _moments(job)
    std = _stds(job, raw)
    device, k = job.compute.device, job.k
    bound = job.metric.at(mean, std).to(device)
    rows = _Rows(job, mean.float().to(device), _inverse(std).float().to(device))
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
    _sign(v)
    basis = job.basis(mean, std, v, values)
    c = project_dataset(job.data, basis, compute=job.compute, ranks=job.ranks)
    reads = 2 + found.iterations
    return job.finished(
        *_whitened(job, basis, c),
        {"route": "iteration", "reads": reads, "exact": False, **found.to_json()},
    )


def _iterate(job: _Job, lanczos: BlockLanczos, saved: Saved, moments: dict[str, Tensor]) -> None:
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


def _whitened(job: _Job, basis: Basis, c: Coefficients) -> tuple[Basis, Coefficients]:
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

    job: _Job
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
        self.whole = keep

    def _fits(self) -> bool:
        if self.job.compute.device.type != "cuda":
            return False  # the system's file cache does that
        free, _ = torch.cuda.mem_get_info(self.job.compute.device)
        return 4 * self.job.p * len(self.job.ranks.mine(self.job.data.training_rows)) < free // 2


def _moments(job: _Job) -> tuple[Tensor, Tensor]:
    """Mean and std [P], sums about the first chunk's mean in double precision; one reading."""
    sums = ColumnSums(_origin(job))
    for w in job.chunks(job.data.training_rows):
        sums.add(job.compute.put(w))
    job.ranks.sum(sums.total)
    job.ranks.sum(sums.squares)
    mean, squares = sums.about_the_mean(job.n)
    return mean.cpu(), _resolved(squares, mean, job.n).cpu()


def _origin(job: _Job) -> Tensor:
    """[P] near the mean, the same on every rank: the mean of the first few rows."""
    first = job.data.vectors(job.data.training_rows[:32])
    return job.ranks.share(first.double().mean(0).float().to(job.compute.device))


def _sign(v: Tensor) -> Tensor:
    """Turn components [K, P], in place, so that their largest entry is positive, since eigenvectors come
    with either sign. Returns the signs [K]."""
    signs = torch.ones(len(v))
    for rows, part in zip(signs.split(256), v.split(256)):
        largest = part.gather(1, part.abs().argmax(dim=1, keepdim=True))
        rows.copy_(torch.where(largest[:, 0] < 0, -1.0, 1.0))
        part.mul_(rows[:, None].to(part))
    return signs
