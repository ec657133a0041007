"""Attribute directions of a space, by least squares on latents with labels.

A linear reading beta_a [d] predicts each standardised attribute from the latents (weights2weights
finds its edits so as well). A step of beta_a / |beta_a|^2 raises the reading of a by one standard
deviation: that is the naive direction. It also moves every other attribute whose reading shares
something with beta_a. The de-biased direction is the shortest step that raises the reading of a by
one and leaves those of the others: D = B (B^T B)^-1 for B [d, A] of all readings involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..space import Space
from .dataset import VectorDataset

RIDGE = (
    1e-3  # in units of the latents' variance; steadies readings of nearly as many latents as rows
)
LEAST_OWN = 0.05  # share of |beta_a|^2 that the others may not explain away


@dataclass(frozen=True, eq=False)
class Directions:
    """Steps of one standard deviation of each attribute, [A, d], and what is known of them."""

    names: tuple[str, ...]
    vectors: Tensor  # [A, d]
    r2: Tensor  # [A], of the readings on rows that took no part, or on the rows themselves
    own: Tensor  # [A], share of |beta_a|^2 that is the attribute's alone: 1 if nothing was shared

    def as_mapping(self) -> dict[str, Tensor]:
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
    """
    beta, mean, std = readings(z, labels, names, ridge=ridge)
    chosen = set(names if against is None else against)
    unknown = sorted(chosen - set(names))
    if unknown:
        raise ConfigError(
            f"There are no labels for '{unknown[0]}'; the attributes are {', '.join(names)}."
        )
    steps, own = [], []
    for a, name in enumerate(names):
        others = [b for b, other in enumerate(names) if b != a and debias and other in chosen]
        step, share = _step(beta[:, a], beta[:, others])
        if share < LEAST_OWN:
            raise DataError(
                f"'{name}' can't be told apart from the other attributes: they explain "
                f"{1 - share:.0%} of its reading. Leave out labels that say the same, or name fewer "
                "to stay clear of."
            )
        steps.append(step)
        own.append(share)
    z_test, true = test if test is not None else (z, labels)
    read = (z_test.double() - z.double().mean(0)) @ beta
    wanted = (true.double() - mean) / std
    r2 = 1 - (read - wanted).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)
    vectors = torch.stack(steps).float()
    return Directions(tuple(names), vectors, r2.float(), torch.tensor(own))


def readings(
    z: Tensor, labels: Tensor, names: Sequence[str], *, ridge: float = RIDGE
) -> tuple[Tensor, Tensor, Tensor]:
    """beta [d, A] that read standardised labels [N, A] from z [N, d], and the labels' mean and deviation [A]."""
    if labels.ndim != 2 or list(labels.shape) != [len(z), len(names)] or len(z) < 3:
        raise DataError(
            f"Directions need latents [N, d] and labels [N, {len(names)}] of the same people. Got "
            f"{list(z.shape)} and {list(labels.shape)}."
        )
    if not (bool(torch.isfinite(labels).all()) and bool(torch.isfinite(z).all())):
        raise DataError("The latents or labels hold NaN or infinite numbers; complete the table.")
    mean, std = labels.double().mean(0), labels.double().std(0)
    constant = [name for name, deviation in zip(names, std.tolist()) if not deviation > 1e-9]
    if constant:
        raise DataError(f"Everybody has the same '{constant[0]}'; leave that column out.")
    x, y = z.double() - z.double().mean(0), (labels.double() - mean) / std
    gram = x.T @ x / len(x)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y / len(x)), mean, std


def space_directions(
    space: Space,
    dataset: VectorDataset,
    *,
    only: Sequence[str] | None = None,
    debias: bool = True,
    against: Iterable[str] | None = None,
) -> Directions:
    """Directions of a space from the labelled training people of a data set, scored on those held out."""
    if dataset.labels is None:
        raise DataError("This data set has no labels; make it with 'w2wpp dataset --labels CSV'.")
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
    """Latents z [N, d] of every row, read in chunks."""
    if space.layout.size != dataset.layout.size or space.layout.modules != dataset.layout.modules:
        raise DataError(
            f"The space has the layout '{space.layout.name}' (P = {space.layout.size}), the data set "
            f"'{dataset.layout.name}' (P = {dataset.layout.size}). Use LoRAs of the space's layout."
        )
    return torch.cat([space.encode(w).mean for _, w in dataset.chunks()])


def report(directions: Directions, debias: bool) -> Mapping[str, object]:
    """What a space file says of its directions."""
    return {
        "method": "least squares, de-biased" if debias else "least squares",
        "unit": "one standard deviation of the attribute",
        "reading_r2": {n: round(v, 4) for n, v in zip(directions.names, directions.r2.tolist())},
        "own_share": {n: round(v, 4) for n, v in zip(directions.names, directions.own.tolist())},
    }


def _step(beta: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """The shortest step [d] with beta^T step = 1 and others^T step = 0, and the share of |beta|^2 left for it."""
    rest = beta
    if others.shape[1]:
        coefficients = torch.linalg.lstsq(others, beta[:, None], driver="gelsd").solution
        rest = beta - (others @ coefficients)[:, 0]
    length = float(rest.square().sum())
    total = float(beta.square().sum())
    return rest / max(length, 1e-30), length / total if total > 0 else 0.0
