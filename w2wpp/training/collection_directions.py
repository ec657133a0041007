"""Attribute directions of a collection: from a table that says of each of its LoRAs what it shows.

The latents of a collection that keeps all of its components are whitened until every two LoRAs are equally far apart,
so nothing can be read from them. Readings are therefore taken of x = c s, coefficients [K] times singular values: there
a length is that of an update. Two readings hold up for few LoRAs:

means     the difference of the means of those that have it and those that do not; of numbers, their covariance
logistic  of those that have it against those that do not (ridge 1 on features of variance 1 in the mean)

Steps are then de-biased as in `directions`, and put back into latents: dz = dx / s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..delta_basis import DeltaBasis
from ..errors import ConfigError, DataError
from ..files.tables import LabelTable
from ..mixtures import members
from ..space import Space
from .directions import LEAST_OWN, Directions, shortest_step

METHODS = ("means", "logistic")
FEWEST = 3  # LoRAs with labels
LEFT_OUT = 100  # LoRAs at most that are left out one by one, to see whether a reading holds
NEWTON = 50  # steps at most


def collection_directions(
    space: Space,
    table: LabelTable,
    *,
    method: str = "means",
    only: Sequence[str] | None = None,
    debias: bool = True,
    against: Iterable[str] | None = None,
) -> Directions:
    """Directions of a space of collected LoRAs from a table whose first column names them.

    Names are those that the space keeps (`keep_names`), or numbers from 0 in the order in which the files came. LoRAs
    without a line take no part. `r2` is of LoRAs left out one by one.

    Raises ConfigError for a space that is no collection, an unknown method or label, DataError for too few LoRAs or an
    attribute that the others explain.
    """
    if method not in METHODS:
        raise ConfigError(
            f"Directions of a collection are by {' or '.join(METHODS)}. Got {method!r}."
        )
    names = tuple(table.names if only is None else only)
    chosen = tuple(table.names if against is None else against)
    unknown = [name for name in (*names, *chosen) if name not in table.names]
    if unknown:
        raise ConfigError(
            f"There are no labels for '{unknown[0]}'; the table has {', '.join(table.names)}."
        )
    rows, lines = _labelled(space, table)
    x, scale = _lengths(space)
    readings, r2 = {}, {}
    for name in dict.fromkeys((*names, *chosen)):
        y = table.values[lines, table.names.index(name)].double()
        readings[name] = _reading(x[rows], y, method, name)
        r2[name] = _left_out(x[rows], y, method, name)
    steps, own = [], []
    for name in names:
        others = [readings[n] for n in chosen if n != name and debias]
        beside = torch.stack(others, 1) if others else x.new_zeros(x.shape[1], 0)
        step, share = shortest_step(readings[name], beside)
        if share < LEAST_OWN:
            raise DataError(
                f"'{name}' can't be told apart from the other attributes: they explain {1 - share:.0%} of its reading. "
                "Leave out labels that say the same, or name fewer to stay clear of."
            )
        steps.append(step / scale)
        own.append(share)
    scores = torch.tensor([r2[name] for name in names])
    return Directions(names, torch.stack(steps).float(), scores, torch.tensor(own))


def _labelled(space: Space, table: LabelTable) -> tuple[list[int], list[int]]:
    """(numbers of the LoRAs that have a line, the lines)."""
    basis = space.basis
    if not isinstance(basis, DeltaBasis):
        raise ConfigError(
            f"The space '{space.name}' does not hold the LoRAs that it was made of, so a table can't name them. Give a "
            "data set with labels."
        )
    kept = space.provenance.get("members")
    names = [str(n) for n in kept] if isinstance(kept, list) else []
    line = {key: i for i, key in enumerate(table.keys)}
    found = []
    for i in range(basis.count):
        keys = [*names[i : i + 1], str(i)] if names else [str(i)]
        at = next((line[key] for key in keys if key in line), None)
        if at is not None:
            found.append((i, at))
    if len(found) < FEWEST:
        called = f"{', '.join(names[:5])} ..." if names else f"0 to {basis.count - 1}"
        raise DataError(
            f"{table.path} has lines for {len(found)} of the {basis.count} LoRAs of the space, expected at least "
            f"{FEWEST}. Its first column should name them: {called}"
            + ("" if names else " (make the space with --keep-names to use their names)")
            + "."
        )
    return [i for i, _ in found], [at for _, at in found]


def _lengths(space: Space) -> tuple[Tensor, Tensor]:
    """x [N, d] of all LoRAs, and what latents are multiplied by to get it [d]; the latents themselves of a VAE."""
    z = members(space).z.double()
    linear = space.codec.name == "pca" and z.shape[1] == space.basis.n_components
    scale = space.basis.singular_values.double() if linear else z.new_ones(z.shape[1])
    scale = scale / scale.square().mean().sqrt()
    return z * scale, scale


def _reading(x: Tensor, y: Tensor, method: str, name: str) -> Tensor:
    """beta [d], so that (x - mean) beta is the attribute in standard deviations, as nearly as along this line.

    Raises DataError for an attribute that is the same everywhere, or of which the LoRAs say nothing.
    """
    centred, spread = x - x.mean(0), y.std(correction=0)
    if not float(spread) > 1e-9:
        raise DataError(f"Every LoRA has the same '{name}'; leave that column out.")
    wanted = (y - y.mean()) / spread
    along = centred.T @ wanted / len(x)
    w = along if method == "means" else _logistic(centred, y, name)
    read = centred @ w
    energy = float(read.square().mean())
    if not energy > 1e-20 * float(centred.square().mean()) * float(w.square().sum()):
        raise DataError(f"These LoRAs say nothing of '{name}'; label others.")
    return w * (float(w @ along) / energy)


def _logistic(x: Tensor, y: Tensor, name: str) -> Tensor:
    """w [d] of a logistic regression with a ridge, by Newton's method, for centred x [n, d].

    Raises DataError for an attribute of more than two values.
    """
    values = y.unique()
    if len(values) != 2:
        raise DataError(
            f"A logistic direction is of an attribute that a LoRA has or has not. '{name}' has {len(values)} values; "
            "use the means."
        )
    size = x.square().mean().sqrt().clamp_min(1e-300)
    ones = x.new_ones(len(x), 1)
    features, target = torch.cat([x / size, ones], 1), (y == values[1]).double()
    ridge = torch.eye(features.shape[1], dtype=x.dtype)
    ridge[-1, -1] = 1e-9  # none on the constant
    w = features.new_zeros(features.shape[1])
    for _ in range(NEWTON):
        p = torch.sigmoid(features @ w)
        slope = features.T @ (p - target) + ridge @ w
        curvature = (features * (p * (1 - p))[:, None]).T @ features + ridge
        step = torch.linalg.solve(curvature, slope)
        w = w - step
        if float(step.abs().max()) < 1e-9:
            break
    return w[:-1]


def _left_out(x: Tensor, y: Tensor, method: str, name: str) -> float:
    """R2 of the readings of LoRAs that took no part in them, one by one; in a large collection, of some."""
    missed = total = 0.0
    for i in range(0, len(x), max(1, len(x) // LEFT_OUT)):
        rest = torch.arange(len(x)) != i
        try:
            beta = _reading(x[rest], y[rest], method, name)
        except DataError:  # the only one of its kind
            beta = x.new_zeros(x.shape[1])
        spread = float(y[rest].std(correction=0))
        read = float((x[i] - x[rest].mean(0)) @ beta) * spread + float(y[rest].mean())
        missed += (read - float(y[i])) ** 2
        total += (float(y[rest].mean()) - float(y[i])) ** 2
    return 1 - missed / total if total > 0 else 0.0
