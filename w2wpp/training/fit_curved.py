"""Fit the curved codec: ridge regression of the coefficients that PCA cuts off, on its latents.

Width and penalty are judged on people who take no part, in principal components found again among the others, as the
training of VAEs does it; then everyone fits the map. If no width and penalty beats leaving the coefficients out, the
map is zero and the codec is PCA.

Letters: n people, K coefficients, d latents, M centres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import build_codec
from ..codecs.curved import CENTRES, Curved, radial
from ..errors import ConfigError, DataError
from ..space import Space, SpaceBasis
from .coefficients import Coefficients, components_among
from .dataset import VectorDataset, holdout_by_identity
from .fit_vae import as_space, coefficients_of, report_of

FOLDS = 5
FEWEST = 20  # people


@dataclass(frozen=True)
class CurvedTraining:
    """What is tried, and on whom."""

    latent: int = 32  # d
    centres: int = CENTRES  # M, drawn from N(0, I) in latents
    # Of the kernel, in units of a latent's weight: latents count by the root of their singular value.
    widths: tuple[float, ...] = (1.5, 2.0, 3.0, 4.5, 7.0)
    penalties: tuple[float, ...] = tuple(
        10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0)
    )
    seed: int = 0  # of centres and folds

    def __post_init__(self) -> None:
        least = (self.latent, self.centres, *self.widths, *self.penalties)
        if not self.widths or not self.penalties or not all(v > 0 for v in least):
            raise ConfigError(
                "A curved codec needs latents, centres, widths and penalties above zero. Got "
                f"{self}."
            )


@torch.no_grad()
def fit_curved(
    data: VectorDataset | Coefficients,
    basis: SpaceBasis,
    training: CurvedTraining | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Space:
    """The space of a curved codec on the training rows; its report is provenance["training_report"]."""
    training = training or CurvedTraining()
    coefficients, d = coefficients_of(data, basis), training.latent
    rows = torch.nonzero(~coefficients.heldout).flatten()
    if d >= basis.n_components:
        raise ConfigError(
            f"A curved codec of {d} latents needs a basis of more components. Got {basis.n_components}; fit "
            "one with more --components, or choose a smaller --latent."
        )
    if len(rows) < FEWEST:
        raise DataError(
            f"A curved codec is fitted to {FEWEST} training rows or more. Got {len(rows)}; use pca."
        )
    c, identity = coefficients.values[rows], coefficients.identity[rows]
    generator = torch.Generator().manual_seed(training.seed)
    directions = torch.randn(training.centres, d, generator=generator, dtype=torch.float64)
    missed = _judge(c, basis.singular_values, identity, directions, training, generator)
    width, penalty, share = _best(missed, training)
    codec = _codec(c, basis.singular_values, directions, width, penalty if share < 1 else None)
    report = {
        **report_of(codec, coefficients, basis),
        "settings": asdict(training),
        # Of what PCA of d cuts off of people who took no part, in the metric of the basis.
        "missed_of_linear": round(share, 6),
        "width": width,
        "penalty": penalty,
        "tried": [[round(v, 6) for v in line] for line in missed.tolist()],
    }
    return as_space(codec, coefficients, basis, provenance, report)


def _judge(
    c: Tensor,
    singular_values: Tensor,
    identity: Tensor,
    directions: Tensor,
    training: CurvedTraining,
    generator: torch.Generator,
) -> Tensor:
    """Share of the energy beyond d that is missed on people who took no part: [widths, penalties]."""
    d, fold = training.latent, torch.zeros(len(c), dtype=torch.long)
    for number in range(1, FOLDS):  # what is left after the others is the first fold's
        left = fold == 0
        share = 1 / (FOLDS - number + 1)
        chosen = holdout_by_identity(identity[left], share, generator=generator)
        fold[torch.nonzero(left).flatten()[chosen]] = number
    missed = torch.zeros(len(training.widths), len(training.penalties), dtype=torch.float64)
    total = 0.0
    for number in range(FOLDS):
        others = fold != number
        inner, scales = components_among(c, singular_values, others)
        if len(scales) <= d:
            raise DataError(
                f"{int(others.sum())} people span {len(scales)} components that matter, too few to judge {d} latents "
                "on the others. Choose a smaller --latent, or use pca."
            )
        z, rest = inner[:, :d].double(), (inner[:, d:] * scales[d:]).double()
        total += float(rest[~others].square().sum())
        for i, width in enumerate(training.widths):
            scale = _scale(scales[:d], width)
            features = radial(z * scale, directions * scale)
            fitted = _Ridge(features[others], rest[others])
            for j, penalty in enumerate(training.penalties):
                found = fitted.predict(features[~others], penalty)
                missed[i, j] += (rest[~others] - found).square().sum()
    return missed / max(total, 1e-300)


def _best(missed: Tensor, training: CurvedTraining) -> tuple[float, float, float]:
    i, j = divmod(int(missed.argmin()), missed.shape[1])
    return training.widths[i], training.penalties[j], float(missed[i, j])


def _codec(
    c: Tensor, singular_values: Tensor, directions: Tensor, width: float, penalty: float | None
) -> Curved:
    """The codec fitted to everyone c [n, K]; without a penalty it stays linear."""
    k, (count, d) = c.shape[1], directions.shape
    sizes = {"coefficient_size": k, "latent_size": d}
    codec = build_codec({"name": "curved", **sizes, "hidden": [count]})
    assert isinstance(codec, Curved)
    scale = _scale(singular_values[:d], width)
    codec.scale.copy_(scale)
    codec.centres.copy_((directions * scale).half())
    if penalty is not None:
        # With the centres as files keep them, in half precision.
        features = radial(c[:, :d].double() * codec.scale.double(), codec.centres.double())
        rest = (c[:, d:] * singular_values[d:]).double()
        weights = _Ridge(features, rest).weights(penalty) / singular_values[d:]
        codec.map.weight.copy_(weights.T.half())
    return codec.requires_grad_(False).eval()


def _scale(singular_values: Tensor, width: float) -> Tensor:
    """[d] by which latents are multiplied: less for those that matter less, and all over the width."""
    s = singular_values.double()
    return (s / s[0]).sqrt() / width


class _Ridge:
    """Least squares of targets [n, T] by features [n, M], for many penalties: one decomposition, of the smaller side.

    Penalties are relative to the mean energy of the features.
    """

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.features, self.targets = features, targets
        self.wide = features.shape[1] > len(features)
        gram = features @ features.T if self.wide else features.T @ features
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.unit = float(features.square().sum(1).mean())
        right = targets if self.wide else features.T @ targets
        self.turned = self.vectors.T @ right

    def weights(self, penalty: float) -> Tensor:
        """[M, T]."""
        solved = self.vectors @ self._shrunk(penalty)
        return self.features.T @ solved if self.wide else solved

    def predict(self, features: Tensor, penalty: float) -> Tensor:
        """[m, T] for features [m, M]."""
        if self.wide:
            return (features @ self.features.T @ self.vectors) @ self._shrunk(penalty)
        return (features @ self.vectors) @ self._shrunk(penalty)

    def _shrunk(self, penalty: float) -> Tensor:
        return self.turned / (self.values.clamp_min(0) + penalty * self.unit)[:, None]
