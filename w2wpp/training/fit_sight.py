"""Reading people by what a pretrained vision model sees in their heads: ridge regressions, no network is trained.

Every painting is looked at as it is and as photographs suffer; what shows of latents is what a linear fit tells from
these features (`painted.readable`), and ridge regression reads it. How strong the ridge is, people decide who took no
part in the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..placement import Frame
from ..sight import LARGEST, Sight, Vision, head_in, known_by
from ..start_network import StartNetwork
from .augment import Augmentation
from .fit_start import LabelMap
from .painted import PaintedPeople, Readable, readable

PENALTIES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of ridges that are tried, in mean eigenvalues
SPARE = (
    8  # features at least beside those that are read: they tell what pictures of people are like
)


@dataclass(frozen=True)
class SightTraining:
    """Settings of reading with a vision model."""

    looks: int = 3  # at each painting: once as it is, then as photographs suffer
    aside: float = 0.2  # share of the people who choose the ridge
    judged: int = 100  # paintings on which confidence is calibrated, each looked at 63 times

    def __post_init__(self) -> None:
        if self.looks < 1 or not 0 < self.aside < 1 or self.judged < 8:
            raise ConfigError(
                "Reading with a vision model looks at least once, and keeps some people aside. Got "
                f"{self.looks=}, {self.aside=}, {self.judged=}."
            )


@dataclass(frozen=True, eq=False)
class Sighted:
    """What came out."""

    network: StartNetwork  # without its eye; it answers in coordinates [r]
    found: Readable
    features: Tensor  # [k, F] of all looks
    penalty: float


def fit_sight(
    painted: PaintedPeople,
    vision: Vision,
    config: SightTraining,
    *,
    frame: Frame,
    head: Tensor,
    augmentation: Augmentation,
    most: int,
    least_share: float,
    features: int,
    seed: int,
    callback: Callable[[int, int, str], None] = lambda done, of, line: None,
) -> Sighted:
    """Read n people by m paintings of each; `frame` and the map `head` say where their heads are.

    Raises DataError for a vision model that sees the same in all of them.
    """
    known = known_by(vision)
    place = head_in(frame.right, frame.down, frame.scale)
    sight = Sight(vision.name, known.shape[1], min(LARGEST, painted.bank.shape[-1]), place)
    seen = _looks(painted, vision, sight, config, head, augmentation, seed, callback)
    _, per_person, width = seen.shape
    mean, std = seen.flatten(0, 1).mean(0), seen.flatten(0, 1).std(0)
    if not bool((std > 0).any()):
        raise DataError(f"The vision model {vision.name} sees the same in every painting.")
    std = std.clamp_min(1e-3 * float(std.max()))
    seen = (seen - mean) / std
    looks = config.looks
    plain = seen[:, ::looks].flatten(0, 1)  # [n * m, V]
    scenes = per_person // looks
    found = readable(
        plain, painted.z.repeat_interleave(scenes, 0), most=most, least_share=least_share
    )
    truth = found(painted.z)[:, None].expand(-1, per_person, -1)
    penalty = _penalty(seen, truth, found.share, config.aside, seed)
    fit = LabelMap.fit(seen.flatten(0, 1), truth.flatten(0, 1), penalty=penalty)
    r = len(found.share)
    spare = min(width, max(SPARE, features - r))
    network = StartNetwork(r, features=r + spare, sight=sight)
    with torch.no_grad():
        network.neck.weight.copy_(torch.cat([fit.weights.T, _principal(seen, spare)]))
        network.neck.bias.copy_(torch.cat([fit.bias, torch.zeros(spare)]))
        network.head.weight.copy_(torch.eye(r, r + spare))
        network.head.bias.zero_()
        network.known.copy_(known)
        network.usual.copy_(torch.stack([mean, std]))
    network = network.requires_grad_(False).eval()
    return Sighted(network, found, network.neck(seen.flatten(0, 1)), penalty)


def _looks(
    painted: PaintedPeople,
    vision: Vision,
    sight: Sight,
    config: SightTraining,
    head: Tensor,
    augmentation: Augmentation,
    seed: int,
    callback: Callable[[int, int, str], None],
) -> Tensor:
    """[n, m * looks, V], the looks at one painting side by side, the first of them as it is."""
    generator = torch.Generator().manual_seed(seed)
    pictures = painted.bank.flatten(0, 1)
    parts, done, of = [], 0, len(pictures) * config.looks
    for some in pictures.split(16):
        shown = some.float() / 127
        views = [shown] + [
            augmentation(shown, generator, head=head) for _ in range(config.looks - 1)
        ]
        parts.append(torch.stack([sight.look(vision, view) for view in views], dim=1))
        done += len(some) * config.looks
        callback(done, of, f"{vision.name}: look {done}")
    return torch.cat(parts).flatten(0, 1).unflatten(0, (len(painted), -1))


def _penalty(seen: Tensor, truth: Tensor, share: Tensor, aside: float, seed: int) -> float:
    """The ridge under which people who took no part are read best, coordinates counting as they show."""
    n = len(seen)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    few = max(1, round(aside * n))
    other, own = order[:few], order[few:]
    misses = []
    for penalty in PENALTIES:
        fit = LabelMap.fit(seen[own].flatten(0, 1), truth[own].flatten(0, 1), penalty=penalty)
        misses.append(float((share * (fit(seen[other]) - truth[other]).square()).mean()))
    return PENALTIES[misses.index(min(misses))]


def _principal(seen: Tensor, count: int) -> Tensor:
    """The first principal directions [count, V] of what is seen [n, k, V]."""
    flat = seen.flatten(0, 1).double()
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    return vectors[:, -count:].flip(1).T.float()
