"""PCA of a data set of vectors, streamed: what weights2weights does before anything else.

Few rows: the Gram matrix of the features of all rows, block of columns by block of columns; the
data are read twice. Few parameters: their covariance; read twice. Both large: block Lanczos, one
reading an iteration beside one for mean and stds and one for the coefficients. Vectors are
single precision; what is summed over them is added up in double.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..basis import Basis
from ..errors import ConfigError
from ..weight_metric import Metric, named_metric
from .basis_job import Callback, FittedBasis, Job
from .by_covariance import by_covariance
from .by_gram import by_gram
from .by_iteration import by_iteration
from .checkpoint import Saved
from .compute import Compute, explained
from .dataset import VectorDataset
from .ranks import Ranks, current_ranks

STANDARDISE = {"parameter": "parameter", "global": "raw"}  # older name of two metrics
EXACT_LIMIT = 8192  # rows of the largest matrix to diagonalise; beyond it, block Lanczos
TOLERANCE = 1e-4  # share of the captured variance that an iteration may lose
ITERATIONS = 60
ADVICE = "Choose fewer --components, use fewer rows, or a machine with more memory; --device cpu streams from disk."


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
    job = Job(
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
    few_rows = n <= max(exact_limit, 2 * components) and n < p
    route = by_gram if few_rows else by_covariance if p <= exact_limit else by_iteration
    if checkpoint is not None and job.ranks.rank and route is not by_iteration:
        checkpoint = f"{os.fspath(checkpoint)}.rank{job.ranks.rank}"  # each has sums of its own
    with explained(ADVICE), torch.no_grad():
        return route(job, Saved(checkpoint, job.digest()))


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
