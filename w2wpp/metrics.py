"""What is measured, as functions of tensors: nothing here knows of a model or a file.

Letters: N identities, M pictures of each, D numbers that describe a face.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over identities with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float | int]:
        """mean, low, high and count."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def estimate(values: Tensor) -> Estimate:
    """Mean of values [N] with the normal 95 % interval (1.96 standard errors)."""
    values = values.double()
    mean = values.mean().item()
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(mean, mean - half, mean + half, len(values))


def ratio_estimate(
    numerator: Tensor, denominator: Tensor, *, paired: bool, draws: int = 2_000, seed: int = 0
) -> Estimate:
    """Ratio of two means, numerator [N] and denominator [N'], with a bootstrap 95 % interval over identities."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(len(numerator), (draws, len(numerator)), generator=generator)
    bottom = (
        top
        if paired
        else torch.randint(len(denominator), (draws, len(denominator)), generator=generator)
    )
    ratios = numerator.double()[top].mean(1) / denominator.double()[bottom].mean(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate((numerator.mean() / denominator.mean()).item(), low, high, len(numerator))


def explained_variance(truth: Tensor, reconstruction: Tensor, mean: Tensor) -> Tensor:
    """R2 of each vector about the training mean [P]: truth, reconstruction [N, P] -> [N]."""
    return 1 - (truth - reconstruction).square().sum(1) / (truth - mean).square().sum(1)


def pooled_r2(truth: Tensor, reconstruction: Tensor, mean: Tensor) -> float:
    """R2 of all vectors [N, P] together: long vectors weigh more than in the mean of ``explained_variance``."""
    return (1 - (truth - reconstruction).square().sum() / (truth - mean).square().sum()).item()


def id_scores(embeddings: Tensor, identity: Tensor) -> Tensor:
    """ID score of each person: unit embeddings [N, M, D] against true identities [N, D] -> mean cosine [N]."""
    return (embeddings * F.normalize(identity, dim=-1)[:, None]).sum(-1).mean(1)


def consistency(embeddings: Tensor) -> Tensor:
    """How much the pictures of one identity resemble each other: [N, M, D] -> mean cosine over pairs [N]."""
    pictures = embeddings.shape[1]
    together = embeddings.sum(1).square().sum(-1)
    return (together - pictures) / (pictures * (pictures - 1))


def likeness_between(embeddings: Tensor) -> Tensor:
    """How much each identity resembles the others: [N, M, D] -> mean cosine between pictures of two people [N]."""
    means = embeddings.mean(1)
    return (means @ means.sum(0) - means.square().sum(-1)) / (len(means) - 1)


def nearest_cosine(embeddings: Tensor, known: Tensor) -> Tensor:
    """Cosine of each identity [N, D] to the nearest known one [N', D] -> [N]."""
    return (F.normalize(embeddings, dim=-1) @ F.normalize(known, dim=-1).T).amax(1)


def path_roughness(path: Tensor) -> Tensor:
    """Largest over mean step of identity paths [N, S, D] -> [N]; 1 is a path of even steps."""
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=-1)
    return steps.amax(1) / steps.mean(1).clamp_min(1e-9)


def pose_diversity(pose: Tensor, reference: Tensor) -> Tensor:
    """Std of the pose over the pictures of one identity [N, M, 4], over that of photographs [n, 4] -> [N]."""
    return (pose.std(1) / reference.std(0)).mean(-1)


def ridge_regression(
    inputs: Tensor, targets: Tensor, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit targets [N, D] by inputs [N, P] with ridge ``penalty`` (in mean eigenvalues of the Gram matrix).

    Returns the input mean [P], weights [P, D] and target mean [D]; solved in the N x N dual, since P is large.
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = (inputs - input_mean).double()
    gram = centred @ centred.T
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    dual = torch.linalg.solve(gram, (targets - target_mean).double())
    return input_mean, (centred.T @ dual).to(inputs.dtype), target_mean


_CACHED = 1 << 20  # numbers


class ColumnSums:
    """Streamed moments of columns: sums of x [n, p] and x^2 about an origin [p], in double precision.

    An origin near the mean keeps the squares from cancelling; everything is read once (Chan et al. 1983, eq. 1.7).
    """

    def __init__(self, origin: Tensor) -> None:
        self.origin = origin
        self.total = torch.zeros(len(origin), dtype=torch.float64, device=origin.device)
        self.squares = torch.zeros_like(self.total)

    def add(self, x: Tensor) -> None:
        """Count some rows x [n, p] in."""
        # A few rows at a time, whose differences stay in the processor's cache.
        for part in x.split(max(1, _CACHED // max(1, len(self.origin)))):
            part = part - self.origin
            self.total += part.sum(0, dtype=torch.float64)
            self.squares += part.square_().sum(0, dtype=torch.float64)

    def about_the_mean(self, n: int) -> tuple[Tensor, Tensor]:
        """Mean [p] of n rows, and the sum of their squares about it [p]."""
        off = self.total / n
        return self.origin.double() + off, (self.squares - n * off.square()).clamp_min(0)
