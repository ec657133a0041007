"""What a Gram matrix of updates tells about a collection of LoRAs: likeness, copies, outliers, and what to expect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COPY = 0.999  # cosine from which on two files hold one update, perhaps at another strength
LONE = 4.0  # how many times longer or shorter than the median an update is when it is called an outlier
LEFT_OUT = 100  # files at most that are left out one at a time
PAIRS = 5  # of nearest neighbours that are told
FEW, SOME = 9, 50  # files


def cosines(gram: Tensor) -> Tensor:
    """Cosines between updates [N, N], whatever their gauge; zero for an update of zero."""
    length = gram.diagonal().clamp_min(0).sqrt()
    scale = length[:, None] * length
    return torch.where(scale > 0, gram / scale.clamp_min(1e-300), 0.0).clamp(-1, 1)


def mean_shares(gram: Tensor, weights: Tensor) -> Tensor:
    """Share of each update's |dW|^2 [N] that the mean of the *others* explains, at its best strength."""
    n = len(gram)
    p = weights.double().expand(n, n) * (1 - torch.eye(n, dtype=torch.float64))
    p = p / p.sum(1, keepdim=True)
    along = (p * gram).sum(1)
    lengths = ((p @ gram) * p).sum(1) * gram.diagonal()
    return torch.where(lengths > 0, along.square() / lengths.clamp_min(1e-300), 0.0)


def held_out_shares(gram: Tensor, weights: Tensor, components: int | None = None) -> Tensor:
    """Share of each update's |dW|^2 [N] that a space of the *others* explains, with as many components.

    A LoRA is left out; mean and components are those of the rest. In a large collection only some
    are, evenly spread, and the others are NaN.
    """
    n = len(gram)
    found = torch.full((n,), math.nan, dtype=torch.float64)
    for i in range(0, n, max(1, n // LEFT_OUT)):
        found[i] = 0.0
        rest = torch.tensor([j for j in range(n) if j != i])
        if len(rest) and gram[i, i] > 0:
            missed = _missed(gram, weights, rest, i, components)
            found[i] = 1.0 - missed / float(gram[i, i])
    return found


def _missed(gram: Tensor, weights: Tensor, rest: Tensor, i: int, components: int | None) -> float:
    """|dW_i - its reconstruction|^2 by a space of the rest."""
    g, p = gram[rest][:, rest], weights.double()[rest]
    p = p / p.sum()
    mean = g @ p
    own = gram[i, rest] - float(p @ gram[i, rest])
    difference = own - (mean - float(p @ mean))  # <dW_i - mean, dW_j - mean>
    distance = float(gram[i, i] - 2 * p @ gram[i, rest] + p @ mean)
    root = p.sqrt()
    centred = g - mean[:, None] - mean + p @ mean
    values, u = torch.linalg.eigh(root[:, None] * centred * root)
    keep = values > 1e-6 * max(float(values[-1]), 1e-3 * float(g.diagonal() @ p))
    if components is not None:
        keep[: max(0, len(values) - components)] = False
    along = (u[:, keep].T @ (root * difference)).square() / values[keep]
    return max(0.0, distance - float(along.sum()))


@dataclass(frozen=True)
class CollectionReport:
    """How a collection of LoRAs turned out as a space."""

    family: str
    names: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]  # those that occur
    components: int
    explained: tuple[float, ...]  # cumulative share of the variance about the mean, per component
    held_out: tuple[float, ...]  # per file: share that a space of the others explains
    mean_only: tuple[float, ...]  # per file: share that the mean of the others explains
    norms: tuple[float, ...]  # |dW|
    pairs: tuple[tuple[str, str, float], ...]  # nearest pairs with their cosine
    copies: tuple[tuple[str, str, float], ...]  # and how much stronger the first is
    outliers: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]  # file and reason
    apart: int = 0  # files that also hold modules of text encoders, or of the model beside these
    text_encoders: bool = False  # whether it is a space of text encoders
    weighed: bool = False  # whether modules count by what the model makes of them
    unread: int = 0  # tensors that are no update of a weight
    rounding: float = (
        0.0  # |difference| / |dW| between what the files hold and what the space keeps
    )

    @property
    def expectation(self) -> str:
        """What to expect of the space, in words."""
        n = len(self.names)
        held, mean = _average(self.held_out), _average(self.mean_only)
        text = f"A LoRA that was left out is explained to {held:.0%} by the others, to {mean:.0%} by their mean alone."
        if held - mean < 0.05:
            text += " So the mean is nearly all that they share: samples will be mixtures, and not new ones."
        if n < FEW:
            text += f" {n} files span {self.components} directions: mix and walk between them; do not expect to sample."
        elif n < SOME:
            text += (
                f" With {n} files, samples stay near the files: mixtures, or a truncation of 0.7 or less, keep them "
                "within the collection. From 50 files on sampling and encoding others become useful."
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, rounded for reading."""
        return {
            "family": self.family,
            "files": len(self.names),
            "modules": self.modules,
            "ranks": list(self.ranks),
            "components": self.components,
            "explained_variance": [round(v, 4) for v in self.explained],
            "held_out_share": round(_average(self.held_out), 4),
            "mean_lora_share": round(_average(self.mean_only), 4),
            "files_with_text_encoder": len(self.names) if self.text_encoders else self.apart,
            "tensors_not_read": self.unread,
            "modules_weighed_by": "the model's output" if self.weighed else "nothing",
            "rounding_error": round(self.rounding, 6),
            "expectation": self.expectation,
            "each": {
                name: {"norm": _short(norm), "held_out": _share(h), "mean_only": _share(m)}
                for name, norm, h, m in zip(self.names, self.norms, self.held_out, self.mean_only)
            },
            "nearest": [[a, b, round(c, 4)] for a, b, c in self.pairs],
            "copies": [[a, b, round(c, 3)] for a, b, c in self.copies],
            "outliers": [list(row) for row in self.outliers],
            "did_not_fit": [list(row) for row in self.refused],
        }

    def for_file(self) -> dict[str, Any]:
        """The part that travels in the space file: figures, no names of files."""
        private = ("each", "nearest", "copies", "outliers", "did_not_fit")
        return {k: v for k, v in self.to_json().items() if k not in private}

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        lines = [
            f"{len(self.names)} LoRAs for {self.family}"
            f"{', their text encoders' if self.text_encoders else ''}: {self.modules} modules, rank {ranks}; "
            f"{self.components} components",
            "variance explained by the first components: "
            + ", ".join(f"{k}: {self.explained[k - 1]:.0%}" for k in _steps(len(self.explained))),
            self.expectation,
        ]
        lines += [f"alike: {a} and {b}, cosine {c:.2f}" for a, b, c in self.pairs]
        lines += [f"copies: {a} is {b}, at {c:.3g} times its strength" for a, b, c in self.copies]
        lines += [f"outlier: {name}, {reason}" for name, reason in self.outliers]
        lines += [f"did not fit: {name}: {reason}" for name, reason in self.refused]
        if self.weighed:
            lines.append("modules count by how much their change changes what the model gives")
        if self.apart:
            also = "the model itself" if self.text_encoders else "the text encoder"
            lines.append(
                f"{self.apart} files also change {also}; that part is kept apart and is not in the space"
            )
        if self.unread:
            lines.append(f"{self.unread} tensors are no update of a weight and were left out")
        if self.rounding > 1e-3:
            lines.append(f"error of what the space keeps of the updates: {self.rounding:.2%}")
        return "\n".join(lines)


def nearest_pairs(names: Sequence[str], cosine: Tensor) -> tuple[tuple[str, str, float], ...]:
    """The pairs that are most alike by their cosines [N, N], copies left out."""
    n = len(names)
    pairs = [
        (float(cosine[i, j]), i, j)
        for i in range(n)
        for j in range(i + 1, n)
        if cosine[i, j] < COPY
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return tuple((names[i], names[j], c) for c, i, j in pairs[:PAIRS])


def copies(
    names: Sequence[str], cosine: Tensor, norms: Tensor
) -> tuple[tuple[str, str, float], ...]:
    """Files that hold one update: (later, first, how many times stronger the later is)."""
    found = []
    for j in range(len(names)):
        for i in range(j):
            if cosine[i, j] >= COPY:
                found.append((names[j], names[i], float(norms[j] / norms[i])))
                break
    return tuple(found)


def outliers(names: Sequence[str], cosine: Tensor, norms: Tensor) -> tuple[tuple[str, str], ...]:
    """Files unlike all others by cosines [N, N] and norms [N]: far longer or shorter, or pointing elsewhere."""
    found = []
    median = float(norms.median())
    if len(names) > 2:
        others = cosine - 2 * torch.eye(len(names), dtype=cosine.dtype)
        nearest = others.max(1).values
        usual = float(nearest.median())
        for name, norm, near in zip(names, norms.tolist(), nearest.tolist()):
            ratio = norm / median
            if not 1 / LONE < ratio < LONE:
                found.append((name, f"its update is {ratio:.2g} times as long as the median"))
            elif usual > 0.05 and near < 0.2 * usual:
                found.append(
                    (name, f"its nearest file has cosine {near:.2f}, usual are {usual:.2f}")
                )
    return tuple(found)


def matrix_json(names: Sequence[str], cosine: Tensor) -> Mapping[str, Any]:
    """A matrix [N, N] of numbers as nested lists, rounded for reading."""
    return {
        "names": list(names),
        "cosines": [[round(v, 6) for v in row] for row in cosine.tolist()],
    }


def map_positions(gram: Tensor) -> Tensor:
    """Where LoRAs lie on a plane [N, 2]: the two directions in which they differ most (classical scaling)."""
    n = len(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, u = torch.linalg.eigh(centred)
    found = torch.zeros(n, 2, dtype=torch.float64)
    for k in range(min(2, n)):
        found[:, k] = u[:, -1 - k] * values[-1 - k].clamp_min(0).sqrt()
        largest = found[:, k].abs().argmax()
        if found[largest, k] < 0:
            found[:, k] *= -1
    return found


def _average(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else 0.0


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _share(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _steps(count: int) -> list[int]:
    return sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < count} | {count})
