"""Whitened coefficients of a data set, which is all that training needs, and reconstruction scores
on them.

Because the components are orthonormal, the squared error of a standardised vector is the error of
its coefficients, each weighted by its squared singular value, plus the part outside of the basis,
which no codec can change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..basis import AnyBasis, Basis
from ..errors import ShapeError, reading
from ..files.container import open_container, write_container
from ..lora.layout import Layout
from .compute import Compute
from .dataset import VectorDataset, ahead, check_holdout
from .gather import public
from .ranks import Ranks

FORMAT = "w2wpp.basis"
ROWS = 8192  # of coefficients whose products are added up in single precision


@dataclass(frozen=True, eq=False)
class Coefficients:
    """c [N, K] of a data set, and what lies outside of the basis, in one value."""

    layout: Layout
    values: Tensor  # [N, K]
    outside: Tensor  # [N], squared length of what the basis can't express, standardised
    identity: Tensor  # [N]
    heldout: Tensor  # [N] bool
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.values)
        if not len(self.outside) == len(self.identity) == len(self.heldout) == n:
            raise ShapeError(f"Coefficients [{n}, K] need as many identities and flags.")
        check_holdout(self.identity, self.heldout)

    def truncated(self, rank: int, singular_values: Tensor) -> Coefficients:
        """Of the first `rank` components of a basis with these singular values [K]."""
        rest = (self.values[:, rank:] * singular_values[rank:]).square().sum(1)
        return replace(self, values=self.values[:, :rank], outside=self.outside + rest)


def project_dataset(
    dataset: VectorDataset,
    basis: AnyBasis,
    *,
    compute: Compute | None = None,
    ranks: Ranks | None = None,
) -> Coefficients:
    """Coefficients of every row, read in chunks, which ranks share."""
    compute, ranks = compute or Compute(), ranks or Ranks()
    values = torch.zeros(len(dataset), basis.n_components)
    outside = torch.zeros(len(dataset))
    moved = basis.to(compute.device)
    scales = moved.singular_values.double()
    everyone = ranks.mine(torch.arange(len(dataset)))
    for rows, w in ahead(dataset.chunks(everyone, buffers=2)):
        w = compute.put(w)
        with compute.products():
            c = moved.project(w).float()
        inside = (c.double() * scales).square().sum(1)
        values[rows] = c.cpu()
        if isinstance(moved, Basis):  # an affine one leaves nothing outside
            energy = moved.energy(w.sub_(moved.mean))
            outside[rows] = (energy - inside).clamp_min(0).float().cpu()
    return Coefficients(
        dataset.layout,
        ranks.sum(values),
        ranks.sum(outside),
        dataset.identity,
        dataset.heldout,
        public(dataset.provenance),
    )


def components_among(c: Tensor, singular_values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of some rows only, found within the coefficients of all.

    c [n, K] and chosen [n] bool -> coefficients [n, K'] whitened on the chosen rows, and their
    singular values [K']. For the other rows they are what a basis would give that never saw them.
    """
    mean = c[chosen].mean(0, dtype=torch.float64).float()
    covariance = torch.zeros(c.shape[1], c.shape[1], dtype=torch.float64)
    for part in (c[chosen] - mean).split(ROWS):
        covariance += part.T @ part
    scales = singular_values.double()
    covariance *= scales * scales[:, None] / (int(chosen.sum()) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    s, v = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    s, v = s[: int(chosen.sum()) - 1], v[:, : int(chosen.sum()) - 1]  # no row spans more
    keep = s > 1e-3 * s[0]
    turn = (scales[:, None] * v[:, keep] / s[keep]).float()
    return (c - mean) @ turn, s[keep].float()


def weight_r2(
    c: Tensor,
    reconstruction: Tensor,
    singular_values: Tensor,
    *,
    center: Tensor | None = None,
    outside: Tensor | None = None,
) -> float:
    """Explained variance of standardised vectors: 1 - sum |x - x'|^2 / sum |x - center|^2.

    c and its reconstruction [B, K]; center [K] is the training mean (0 for a PCA basis); outside
    [B] counts as error.
    """
    weights = singular_values.square()
    missed = ((c - reconstruction).square() * weights).sum(1).double()
    spread = ((c if center is None else c - center).square() * weights).sum(1).double()
    if outside is not None:
        missed, spread = missed + outside, spread + outside
    return float(1.0 - missed.sum() / spread.sum())


def save_coefficients(
    path: str | os.PathLike[str],
    coefficients: Coefficients,
    basis: Basis,
    report: Mapping[str, Any] | None = None,
) -> None:
    """A basis with the coefficients of the data set it was made from: what `w2wpp train` reads.

    `report` says how it was found.
    """
    tensors = {
        **{f"basis.{name}": t for name, t in basis.tensors().items()},
        "coefficients": coefficients.values,
        "outside": coefficients.outside,
        "identity": coefficients.identity,
        "heldout": coefficients.heldout,
    }
    config = {
        "layout": coefficients.layout.to_json(),
        "basis": basis.config(),
        "provenance": dict(coefficients.provenance),
        "fit": dict(report or {}),
    }
    write_container(path, tensors, format=FORMAT, config=config)


def load_coefficients(path: str | os.PathLike[str]) -> tuple[Coefficients, Basis]:
    """What `save_coefficients` wrote. Raises FormatError for any other file."""
    file = open_container(path, FORMAT)
    with reading(f"{path}: the configuration of this basis"):
        layout = Layout.from_json(file.config["layout"])
        basis = Basis.from_container(file, layout, file.config["basis"])
        provenance = public(file.config.get("provenance", {}))
    n = file.require("coefficients", (None, basis.n_components), torch.float32).shape[0]
    file.require("outside", (n,), torch.float32)
    file.require("identity", (n,), torch.int64)
    file.require("heldout", (n,), torch.bool)
    coefficients = Coefficients(
        layout,
        file.read("coefficients"),
        file.read("outside"),
        file.read("identity"),
        file.read("heldout"),
        provenance,
    )
    return coefficients, basis
