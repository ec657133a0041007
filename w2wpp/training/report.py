"""What a training leaves behind in the space file: how well it reconstructs, and whether its latents are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, Posterior
from .coefficients import Coefficients, weight_r2

ACTIVE = 0.01  # variance of a unit's posterior mean over the data above which it is in use (Burda et al. 2016)
HISTORY_ROWS = 100


@torch.no_grad()
def reconstruction_report(
    codec: Codec, data: Coefficients, singular_values: Tensor, splits: Mapping[str, Tensor]
) -> dict[str, float]:
    """Weight-space R2 of the posterior mean of coefficients [N, K] for each non-empty split, {name: rows}."""
    return _scores(lambda c: codec.decode(codec.encode(c).mean), data, singular_values, splits)


def pca_report(
    data: Coefficients, singular_values: Tensor, splits: Mapping[str, Tensor], d: int
) -> dict[str, float]:
    """The same of the first d coefficients: PCA of that size, to compare a codec with."""
    center = data.values[~data.heldout].mean(0)

    def cut(c: Tensor) -> Tensor:
        return torch.cat([c[:, :d], center[d:].expand(len(c), -1)], 1)

    return _scores(cut, data, singular_values, splits)


def _scores(
    reconstruct: Callable[[Tensor], Tensor],
    data: Coefficients,
    singular_values: Tensor,
    splits: Mapping[str, Tensor],
) -> dict[str, float]:
    center = data.values[~data.heldout].mean(0)
    scores = {}
    for name, rows in splits.items():
        if len(rows):
            c, outside = data.values[rows], data.outside[rows]
            r2 = weight_r2(c, reconstruct(c), singular_values, center=center, outside=outside)
            scores[name] = round(r2, 6)
    return scores


def latent_report(posterior: Posterior) -> dict[str, Any]:
    """KL per unit and the number of units in use, from the posteriors [B, d] of the training rows."""
    kl = posterior.kl().mean(0)
    active = int((posterior.mean.var(0) > ACTIVE).sum())
    return {
        "latent_size": len(kl),
        "active_units": active,
        "kl_total": round(float(kl.sum()), 4),
        "kl_per_unit": [round(v, 4) for v in kl.tolist()],
        "collapse": collapse_sentence(active, len(kl)),
    }


def collapse_sentence(active: int, size: int) -> str:
    """What it means that so many of the latent units carry anything."""
    if active == size:
        return f"No posterior collapse: all {size} latent units are active."
    if active == 0:
        return (
            f"Posterior collapse: none of the {size} latent units is active, the decoder ignores "
            "them. "
            "Lower beta, raise free_bits or anneal for longer."
        )
    advice = "Lower beta or raise free_bits to use them, or train a smaller latent."
    kind = "Partial posterior collapse" if active < size / 2 else "Some latent units are unused"
    return f"{kind}: {active} of {size} latent units are active. {advice}"


def without_curves(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report short enough to print."""
    return {
        k: without_curves(v) if isinstance(v, Mapping) else v
        for k, v in report.items()
        if k not in ("history", "kl_per_unit")
    }


def thinned(history: Sequence[Mapping[str, Any]], rows: int = HISTORY_ROWS) -> list[dict[str, Any]]:
    """At most `rows` entries, evenly spread, first and last included; numbers rounded to what a reader needs."""
    n = len(history)
    keep = sorted({round(i * (n - 1) / (rows - 1)) for i in range(rows)}) if n > rows else range(n)
    return [
        {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in history[i].items()}
        for i in keep
    ]
