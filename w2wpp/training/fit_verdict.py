"""How far a start network's answers can be trusted: its confidence is fitted to paintings that it did not learn from.

They are shown as they are, as photographs suffer, and so that nobody could tell who it is; what is fitted is how close
the answer comes to the truth, from what can be seen without knowing it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evidence import NAMES, agreement_of, evidence, table
from ..placement import crop
from ..start_network import StartNetwork
from .augment import Augmentation, plain

VERSION = 1
FALSE_ALARMS = 0.05
PENALTY = 1e-3
LIMIT = 4.0  # stds beyond which evidence says no more


def fit_verdict(
    start: StartNetwork,
    z: Tensor,
    bank: Tensor,
    directions: Tensor,
    augmentation: Augmentation,
    *,
    head: Tensor | None = None,
    most: int = 600,
    seed: int = 41,
) -> dict[str, Any]:
    """JSON for `inversion.verdict`, from latents [n, d], their paintings [n, m, 3, S, S], and what shows [d, r]."""
    generator = torch.Generator().manual_seed(seed)
    z, pictures = z[:most], bank[:most, 0].float() / 127
    truth = z @ directions
    rows, closeness = [], []
    clean = Augmentation(
        shift=0.03, zoom=0.03, turn=0.03, mirrored=0, gain=0.1, tint=0, grey=0, blur=0.2, jpeg=0.2,
        noise=0.01, hidden=0, covered=0, background=0,
    )  # fmt: skip
    for shown, is_person in _shown(pictures, clean, augmentation, generator, head):
        found = evidence(start, shown)
        with torch.no_grad():
            answer = start(shown) @ directions
        near = F.cosine_similarity(answer, truth, dim=1).clamp(0, 1) * is_person
        rows.append(table(found))
        closeness.append(near)
    seen, wanted = torch.cat(rows), torch.cat(closeness)
    mean, std = seen.mean(0), seen.std(0).clamp_min(1e-3)
    weights = _logistic(_columns(seen, mean, std), wanted)
    usual = _columns(rows[0], mean, std) @ weights
    best, flag = usual.sigmoid().median(), usual.sigmoid().quantile(FALSE_ALARMS)
    limits = {
        name: [round(float(q), 4) for q in rows[0][:, i].quantile(torch.tensor([0.02, 0.98]))]
        for i, name in enumerate(NAMES)
    }
    return {
        "version": VERSION,
        "evidence": list(NAMES),
        "mean": [round(float(n), 5) for n in mean],
        "std": [round(float(n), 5) for n in std],
        "weights": [round(float(n), 5) for n in weights],
        "usual": limits,  # of pictures that are as they should be, 2 % to either side
        "flag_below": round(float(flag), 4),
        "typical": round(float(best), 4),
        **({} if bank.shape[1] < 2 else {"repaint": _agreements(start, bank[:most])}),
    }


@torch.no_grad()
def _agreements(start: StartNetwork, bank: Tensor) -> dict[str, list[float]]:
    """Mean and std of how answers to two paintings agree: of one person, and of two."""
    first, second = (start(bank[:, scene].float() / 127) for scene in (0, 1))
    found = {}
    for name, again in (("same", second), ("other", second.roll(1, 0))):
        x = agreement_of(F.cosine_similarity(first, again, dim=1))
        found[name] = [round(float(x.mean()), 4), round(max(float(x.std()), 0.05), 4)]
    return found


def _columns(seen: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """As `inversion.verdict` has them: 1, evidence in stds, and its squares."""
    x = ((seen - mean) / std).clamp(-LIMIT, LIMIT)
    return torch.cat([torch.ones(len(x), 1), x, x.square()], dim=1)


def _logistic(x: Tensor, wanted: Tensor) -> Tensor:
    """Weights whose sigmoid comes closest to numbers in [0, 1], by cross entropy."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    x, wanted = x.double(), wanted.double()
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weights, wanted)
        loss = loss + PENALTY * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
    return weights.detach().float()


def _shown(
    pictures: Tensor,
    clean: Augmentation,
    augmentation: Augmentation,
    generator: torch.Generator,
    head: Tensor | None,
) -> list[tuple[Tensor, float]]:
    """Batches of pictures, the usual ones first, and whether they show one person (1) or nobody (0)."""
    count, size = len(pictures), pictures.shape[-1]
    other = pictures.roll(1, 0)
    half = torch.ones(count, 1, 1, size)
    half[..., size // 2 :] = 0
    half = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, half, 1 - half)
    cover = plain(count, size, generator)
    far = torch.rand(count, 4, generator=generator) * 2 - 1
    far = far.sign() * (0.3 + 0.7 * far.abs()) * torch.tensor([0.7, 0.7, 0.8, 0.9])
    dark = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    return [
        (clean(pictures, generator), 1.0),
        (augmentation(pictures, generator, head=head), 1.0),
        (augmentation(pictures, generator, head=head), 1.0),
        (pictures * half + cover * (1 - half), 1.0),
        (crop(pictures, far, size)[0], 1.0),
        (((pictures + 1) * dark - 1), 1.0),
        ((pictures + other) / 2, 0.0),
        (plain(count, size, generator), 0.0),
        (pictures * 0 - 1 + 0.02 * torch.rand(count, 1, 1, 1, generator=generator), 0.0),
    ]
