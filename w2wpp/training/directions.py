"""Attribute directions of a space, by least squares on latents with labels.

A linear reading beta_a [d] predicts each standardised attribute from the latents (weights2weights
finds its edits so as well). A step of beta_a / |beta_a|^2 raises the reading of a by one standard
std: that is the naive direction. It also moves every other attribute whose reading shares
something with beta_a. The de-biased direction is the shortest step that raises the reading of a by
one and leaves those of the others: D = B (B^T B)^-1 for B [d, A] of all readings involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..commands import command
from ..errors import ConfigError, DataError
from ..space import Space
from .dataset import VectorDataset

RIDGE = (
    1e-3  # in units of the latents' variance; steadies readings of nearly as many latents as rows
)
CHUNK = 8192  # rows at a time
LEAST_OWN = 0.05  # share of |beta_a|^2 that the others may not explain away


@dataclass(frozen=True, eq=False)
class Directions:
    """Steps of one standard deviation of each attribute, [A, d], and what is known of them."""

    names: tuple[str, ...]
    vectors: Tensor  # [A, d]
    r2: Tensor  # [A], of the readings on rows that took no part, or on the rows themselves
    own: Tensor  # [A], share of |beta_a|^2 that is the attribute's alone: 1 if nothing was shared

    def as_mapping(self) -> dict[str, Tensor]:
        """{name: direction [d]}, as a space keeps them."""
        return dict(zip(self.names, self.vectors))


def fit_directions(
    z: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    debias: bool = True,
    against: Iterable[str] | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    ridge: float = RIDGE,
) -> Directions:
    """Directions in latents z [N, d] for labels [N, A], any scale (-1 / 1 as well as numbers).

    `against` names the attributes that a direction has to leave alone, all others by default.
    `test` holds latents and labels of other people, to score the readings on.

    Raises DataError for latents and labels that do not belong together, and what `fit_from_moments` raises.
    """
    if labels.ndim != 2 or list(labels.shape) != [len(z), len(names)]:
        raise DataError(
            f"Directions need latents [N, d] and labels [N, {len(names)}] of the same people. Got "
            f"{list(z.shape)} and {list(labels.shape)}."
        )
    sums = Moments(z.shape[1], len(names))
    for rows in torch.arange(len(z)).split(CHUNK):
        sums.add(z[rows], labels[rows])
    return fit_from_moments(sums, names, debias=debias, against=against, test=test, ridge=ridge)


def fit_from_moments(
    sums: Moments,
    names: Sequence[str],
    *,
    debias: bool = True,
    against: Iterable[str] | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    ridge: float = RIDGE,
) -> Directions:
    """The same from sums over people, for sets that do not fit in memory.

    Raises ConfigError for a label that is not there, DataError for one that the others explain.
    """
    beta, r2 = _readings(sums, names, ridge, test)
    chosen = set(names if against is None else against)
    unknown = sorted(chosen - set(names))
    if unknown:
        raise ConfigError(
            f"There are no labels for '{unknown[0]}'; the attributes are {', '.join(names)}."
        )
    steps, own = [], []
    for a, name in enumerate(names):
        others = [b for b, other in enumerate(names) if b != a and debias and other in chosen]
        step, share = shortest_step(beta[:, a], beta[:, others])
        if share < LEAST_OWN:
            raise DataError(
                f"'{name}' can't be told apart from the other attributes: they explain "
                f"{1 - share:.0%} of its reading. Leave out labels that say the same, or name fewer "
                "to stay clear of."
            )
        steps.append(step)
        own.append(share)
    return Directions(tuple(names), torch.stack(steps).float(), r2.float(), torch.tensor(own))


class Moments:
    """First and second moments of latents z [N, d] and labels [N, A], added up in double precision."""

    def __init__(self, d: int, attributes: int) -> None:
        size = d + attributes
        self.d, self.count = d, 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, z: Tensor, labels: Tensor) -> None:
        """Merge some rows (Chan et al. 1983). Raises DataError for NaN and infinity."""
        both = torch.cat([z.double(), labels.double()], dim=1)
        if not bool(torch.isfinite(both).all()):
            raise DataError(
                "The latents or labels hold NaN or infinite numbers; complete the table."
            )
        n, mean = len(both), both.mean(0)
        delta, total = mean - self.mean, self.count + n
        centred = both - mean
        self.scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total


def space_directions(
    space: Space,
    dataset: VectorDataset,
    *,
    only: Sequence[str] | None = None,
    debias: bool = True,
    against: Iterable[str] | None = None,
) -> Directions:
    """Directions of a space from the labelled training people of a data set, scored on those held out.

    Raises DataError for a data set without labels, ConfigError for one that it lacks.
    """
    if dataset.labels is None:
        line = command("dataset --labels CSV")
        raise DataError(f"This data set has no labels; make it with '{line}'.")
    names = tuple(only) if only is not None else dataset.label_names
    unknown = [name for name in names if name not in dataset.label_names]
    if unknown:
        raise ConfigError(
            f"There are no labels for '{unknown[0]}'; the data set has "
            f"{', '.join(dataset.label_names)}."
        )
    columns = [dataset.label_names.index(name) for name in names]
    latents = encode_rows(space, dataset)
    train, held = dataset.training_rows, dataset.heldout_rows
    labels = dataset.labels[:, columns]
    test = (latents[held], labels[held]) if len(held) > 1 else None
    return fit_directions(
        latents[train], labels[train], names, debias=debias, against=against, test=test
    )


@torch.no_grad()
def encode_rows(space: Space, dataset: VectorDataset) -> Tensor:
    """Latents z [N, d] of every row, read in chunks. Raises DataError for LoRAs of another layout."""
    if space.layout.size != dataset.layout.size or space.layout.modules != dataset.layout.modules:
        raise DataError(
            f"The space has the layout '{space.layout.name}' (P = {space.layout.size}), the data set "
            f"'{dataset.layout.name}' (P = {dataset.layout.size}). Use LoRAs of the space's layout."
        )
    return torch.cat([space.encode(w).mean for _, w in dataset.chunks()])


def report(
    directions: Directions, debias: bool, method: str = "least squares"
) -> Mapping[str, object]:
    """What a space file says of its directions."""
    return {
        "method": f"{method}, de-biased" if debias else method,
        "unit": "one standard deviation of the attribute",
        "reading_r2": {n: round(v, 4) for n, v in zip(directions.names, directions.r2.tolist())},
        "own_share": {n: round(v, 4) for n, v in zip(directions.names, directions.own.tolist())},
    }


def _readings(
    sums: Moments, names: Sequence[str], ridge: float, test: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """beta [d, A] that read standardised labels from latents, and their R2 [A]."""
    d, n = sums.d, sums.count
    if n < 3:
        raise DataError(f"Directions need labelled people, at least three. Got {n}.")
    covariance = sums.scatter / n
    std = covariance.diagonal()[d:].sqrt()
    constant = [name for name, s in zip(names, std.tolist()) if not s > 1e-9]
    if constant:
        raise DataError(f"Everybody has the same '{constant[0]}'; leave that column out.")
    zz, zy = covariance[:d, :d], covariance[:d, d:] / std
    ridged = zz + ridge * zz.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    beta = torch.linalg.solve(ridged, zy)
    if test is None:
        return beta, 2 * (beta * zy).sum(0) - (beta * (zz @ beta)).sum(0)
    read = (test[0].double() - sums.mean[:d]) @ beta
    wanted = (test[1].double() - sums.mean[d:]) / std
    missed, spread = (read - wanted).square().sum(0), (wanted - wanted.mean(0)).square().sum(0)
    return beta, 1 - missed / spread


def shortest_step(beta: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """The shortest step [d] with beta^T step = 1 and others^T step = 0, and the share of |beta|^2 left for it."""
    rest = beta
    if others.shape[1]:
        coefficients = torch.linalg.lstsq(others, beta[:, None], driver="gelsd").solution
        rest = beta - (others @ coefficients)[:, 0]
    length = float(rest.square().sum())
    total = float(beta.square().sum())
    return rest / max(length, 1e-30), length / total if total > 0 else 0.0
