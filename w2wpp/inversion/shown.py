"""Which way steps may go: along what shows of latents in pictures, as a start network was taught to read it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..commands import command
from ..errors import ConfigError
from ..start_network import StartNetwork


def shown(start: StartNetwork | None, energy: float) -> Tensor:
    """Orthonormal directions [r, d] of latents, those that show most first.

    A network's `spread` [a, d] says how latents move with each thing that it reads; its singular values are how
    strongly each direction is told by pictures. Kept are those whose energy, the value's square, is at least this share
    of the strongest one's.

    Raises ConfigError for a share outside of (0, 1], and for a space whose start network does not say what shows.
    """
    if not 0 < energy <= 1:
        raise ConfigError(
            f"What shows is a share of the strongest, above 0 and at most 1. Got {energy}."
        )
    if start is None or not len(start.spread) or not bool(start.spread.any()):
        raise ConfigError(
            "This recipe takes steps only along what shows, and the space has no start network that says what does. "
            f"W2W++ Train Start Network makes one, or the command '{command('fit-start')}'."
        )
    spread = start.spread.detach().float().cpu()
    _, strength, directions = torch.linalg.svd(spread, full_matrices=False)
    kept = strength.square() >= energy * strength[0].square()
    return directions[kept]
