"""PCA of a data set of vectors, streamed: what weights2weights does before anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..basis import Basis, without_tiny
from ..errors import ConfigError, DataError
from .dataset import VectorDataset

STANDARDISE = ("parameter", "global")
EXACT_LIMIT = 8192  # rows of the largest matrix to diagonalise; beyond it, subspace iteration
OVERSAMPLING, ITERATIONS = 32, 6  # of the subspace iteration (Halko, Martinsson and Tropp 2011)


def fit_basis(
    dataset: VectorDataset,
    components: int,
    *,
    standardise: str = "parameter",
    exact_limit: int = EXACT_LIMIT,
) -> Basis:
    """The leading principal components of the training rows. Held-out rows are never looked at.

    `parameter` divides every parameter by its own deviation (as w2w does), `global` all by one.
    Rows are read in chunks, several times; the memory is that of one chunk, the components and the
    smaller one of the covariance [P, P] and the Gram matrix [N, N].
    """
    rows = dataset.training_rows
    n, p = len(rows), dataset.layout.size
    if standardise not in STANDARDISE:
        raise ConfigError(
            f"Vectors are standardised per {' or '.join(STANDARDISE)}. Got {standardise!r}."
        )
    if not 1 <= components <= min(n - 1, p):
        raise ConfigError(
            f"{n} training rows of {p} parameters support 1 to {min(n - 1, p)} components. Got "
            f"{components}."
        )
    mean, std = _moments(dataset, rows)
    if standardise == "global":
        std = torch.full_like(std, float(std.square().mean().sqrt()))
    std = without_tiny(std)
    inverse = torch.where(std == 0, 0.0, 1.0 / std)

    def chunks() -> Iterator[Tensor]:
        for _, w in dataset.chunks(rows):
            yield (w.double() - mean) * inverse

    if min(n, p) > exact_limit:
        variances, v = _by_iteration(chunks, n, p, components)
    elif n < p:
        variances, v = _by_gram(chunks, n, p, components)
    else:
        variances, v = _by_covariance(chunks, n, p, components)
    rank = int((variances > 1e-10 * variances[0].clamp_min(1e-300)).sum())
    if rank < components:
        raise DataError(
            f"The training rows span only {rank} directions. Ask for at most that many components."
        )
    return Basis(mean, std, _signed(v), variances.sqrt())


def _moments(dataset: VectorDataset, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [P] in double precision, merged chunk by chunk (Chan et al. 1983)."""
    count = 0
    mean = torch.zeros(dataset.layout.size, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for _, w in dataset.chunks(rows):
        m, chunk_mean = len(w), w.double().mean(0)
        delta, total = chunk_mean - mean, count + m
        squares += (w.double() - chunk_mean).square().sum(0) + delta.square() * (count * m / total)
        mean += delta * (m / total)
        count = total
    return mean, (squares / (count - 1)).sqrt()


Chunks = Callable[[], Iterator[Tensor]]  # standardised rows [n, P], from the start at every call


def _by_covariance(chunks: Chunks, n: int, p: int, k: int) -> tuple[Tensor, Tensor]:
    """Variances [K] and components [K, P] from X^T X."""
    covariance = torch.zeros(p, p, dtype=torch.float64)
    for x in chunks():
        covariance.addmm_(x.T, x)
    values, vectors = torch.linalg.eigh(covariance / (n - 1))
    return values.flip(0)[:k].clamp_min(0), vectors.flip(1)[:, :k].T


def _by_gram(chunks: Chunks, n: int, p: int, k: int) -> tuple[Tensor, Tensor]:
    """The same from X X^T, for fewer rows than parameters: a component is X^T u / |X^T u|."""
    gram = torch.zeros(n, n, dtype=torch.float64)
    i = 0
    for x in chunks():
        j = 0
        for y in chunks():
            gram[i : i + len(x), j : j + len(y)] = x @ y.T
            j += len(y)
            if j > i + len(x) - 1:  # the rest follows by symmetry
                break
        i += len(x)
    gram = gram.tril() + gram.tril(-1).T
    values, u = torch.linalg.eigh(gram / (n - 1))
    values, u = values.flip(0)[:k].clamp_min(0), u.flip(1)[:, :k]
    v = torch.zeros(k, p, dtype=torch.float64)
    i = 0
    for x in chunks():
        v.addmm_(u[i : i + len(x)].T, x)
        i += len(x)
    return values, torch.nn.functional.normalize(v, dim=1)


def _by_iteration(chunks: Chunks, n: int, p: int, k: int) -> tuple[Tensor, Tensor]:
    """The same for sets too large to diagonalise: subspace iteration from a fixed random start."""
    width = min(k + OVERSAMPLING, n, p)
    start = torch.randn(p, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(_apply_covariance(chunks, q)).Q
    values, u = torch.linalg.eigh(q.T @ _apply_covariance(chunks, q) / (n - 1))
    return values.flip(0)[:k].clamp_min(0), (q @ u.flip(1)[:, :k]).T


def _apply_covariance(chunks: Chunks, q: Tensor) -> Tensor:
    y = torch.zeros_like(q)
    for x in chunks():
        y.addmm_(x.T, x @ q)
    return y


def _signed(v: Tensor) -> Tensor:
    """Components with their largest entry positive, since eigenvectors come with either sign."""
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))
    return v * torch.sign(largest)
