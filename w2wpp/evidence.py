"""What speaks for and against a start network's answer, picture by picture: what a verdict is made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .placement import crop
from .start_network import StartNetwork

NAMES = ("strangeness", "mirrored", "moved", "halves", "certain", "displaced", "length")
# Right, down, log scale, turn of looking once more: what a person's answer should survive.
MOVES = ((0.06, 0.0, 0.0, 0.0), (-0.04, 0.05, 0.06, 0.0), (0.0, -0.05, -0.06, 0.06))


@torch.no_grad()
def evidence(
    start: StartNetwork, pictures: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Pictures [n, 3, S, S] in the frame of a space, masks [n, 1, S, S] of them -> numbers [n] by name.

    strangeness  how unlike pictures of people the features are, log; 0 where the network was not measured
    mirrored     cosine of the answers to the picture and to its mirror image
    moved        the least cosine to the answers to it moved a little
    halves       cosine of the answers to its left and to its right half, the other one hidden
    certain      log odds that the locator sees somebody, 0 without one
    displaced    how far from here it sees the frame
    length       of the answer, in stds of the space, log
    """
    if mask is not None and start.hides:
        pictures = pictures * mask
    features = start.describe(pictures)
    answer = start.answer(features)
    half = torch.ones_like(pictures[:1, :1])
    half[..., half.shape[-1] // 2 :] = 0
    nothing = torch.zeros(len(pictures)).to(answer)
    found = {
        "mirrored": _agreement(answer, start(pictures.flip(-1))),
        "moved": torch.stack([_agreement(answer, start(_moved(pictures, m))) for m in MOVES]).amin(0),
        "halves": _agreement(start(pictures * half), start(pictures * (1 - half))),
        "length": answer.square().mean(1).sqrt().clamp_min(1e-4).log(),
        "strangeness": start.strangeness(features).clamp_min(1e-4).log() if start.measured else nothing,
        "certain": nothing,
        "displaced": nothing,
    }  # fmt: skip
    if start.locates:
        seen = start.locate(pictures)
        found["certain"] = seen.certainty.clamp(1e-4, 1 - 1e-4).logit()
        found["displaced"] = seen.placement.norm(dim=1)
    return {name: found[name].float().cpu() for name in NAMES}


def agreement_of(cosine: Tensor) -> Tensor:
    """Cosines as numbers that spread evenly: Fisher's artanh."""
    return cosine.clamp(-0.999, 0.999).atanh()


def table(found: Mapping[str, Tensor]) -> Tensor:
    """As columns [n, 7] in the order of their names."""
    return torch.stack([found[name] for name in NAMES], dim=1)


def _moved(pictures: Tensor, move: tuple[float, ...]) -> Tensor:
    placement = torch.tensor([move]).expand(len(pictures), -1)
    return crop(pictures, placement.to(pictures), pictures.shape[-1])[0]


def _agreement(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first, second, dim=1)
