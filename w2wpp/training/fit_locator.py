"""Teach a network where in a picture the frame of a space's pictures lies: from the pictures alone, moved about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..placement import crop, inverse
from ..rates import warm_cosine
from ..start_network import FARTHEST, NEAREST, PLACE, PictureNetwork
from .augment import Augmentation, plain
from .compute import Compute


@dataclass(frozen=True)
class LocatorTraining:
    """Settings of a locator's training."""

    seed: int = 21
    steps: int = 2_000
    batch: int = 64
    learning_rate: float = 2e-3  # peak; linear warm-up, cosine to zero
    nobody: float = 0.3  # share of pictures that show nobody, or hardly anybody
    near: float = 0.5  # share of frames close to the whole picture, as a second look has them
    size: int = 64
    width: int = 24
    features: int = 128


_LOOKS = Augmentation(shift=0.0, zoom=0.0, turn=0.0, mirrored=0.0, hidden=0.1, background=0.0)
_FAR = (0.9, 0.9, 1.0, 0.6)  # half ranges of frames that are looked for
_NEAR = (0.3, 0.3, 0.35, 0.35)
_SMALLER = (
    -0.45
)  # log scale about which frames are looked for: windows are rather too large than too small


def fit_locator(
    pictures: Callable[[int, torch.Generator], Tensor],
    config: LocatorTraining,
    *,
    head: Tensor | None = None,
    compute: Compute | None = None,
    callback: Callable[[int, int, str], None] = lambda done, of, line: None,
) -> PictureNetwork:
    """`pictures(count, generator)` draws people in the frame, [count, 3, S, S] in [-1, 1]; `head` [S, S] in [0, 1] says
    where they usually are, so that they can be put before something else."""
    compute = compute or Compute()
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = PictureNetwork(
            PLACE + 1, size=config.size, width=config.width, features=config.features
        )
    network.to(compute.device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.02)
    for step in range(config.steps):
        rate = warm_cosine(step, config.steps, warmup=min(100, 1 + config.steps // 10))
        optimiser.param_groups[0]["lr"] = config.learning_rate * rate
        seen, place, present = scenes(pictures, config, generator, head=head)
        seen, place, present = compute.put(seen), compute.put(place), compute.put(present)
        with compute.products():
            answer = network(seen).float()
        miss = F.smooth_l1_loss(answer[:, :PLACE], place, beta=0.1, reduction="none").mean(1)
        loss = 2 * (miss * present).mean()
        loss = loss + F.binary_cross_entropy_with_logits(answer[:, PLACE], present)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        callback(step + 1, config.steps, f"locator step {step + 1}, loss {loss.item():.4f}")
    return network.requires_grad_(False).eval().cpu()


def scenes(
    pictures: Callable[[int, torch.Generator], Tensor],
    config: LocatorTraining,
    generator: torch.Generator,
    *,
    head: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, S, S] with a frame somewhere in them, its placement [B, 4], and whether there is one [B]."""
    count, size = config.batch, config.size
    people = pictures(count, generator)
    if people.shape[-1] != size:
        people = F.interpolate(people, (size, size), mode="bilinear", antialias=True)
    uniform = torch.rand(count, PLACE, generator=generator) * 2 - 1
    near = torch.rand(count, 1, generator=generator) < config.near
    far = uniform * torch.tensor(_FAR) + torch.tensor([0.0, 0.0, _SMALLER, 0.0])
    place = torch.where(near, uniform * torch.tensor(_NEAR), far)
    place = torch.minimum(torch.maximum(place, torch.tensor(NEAREST)), torch.tensor(FARTHEST))
    seen = _placed(people, place, head, generator)
    # Mostly outside, far too large or far too small, taken apart, or nothing at all: nobody whom an answer would help.
    nobody = torch.rand(count, generator=generator) < config.nobody
    kind = torch.randint(4, (count,), generator=generator)
    away = torch.rand(count, PLACE, generator=generator) * 2 - 1
    away = away * torch.tensor([0.3, 0.3, 0.2, 0.5])
    side = torch.randint(4, (count,), generator=generator)
    shift = torch.tensor([[1.7, 0.0], [-1.7, 0.0], [0.0, 1.7], [0.0, -1.7]])[side]
    large = torch.tensor([0.0, 0.0, 1.7, 0.0]) + torch.cat([shift * 1.5, torch.zeros(count, 2)], 1)
    outside = torch.where((kind == 0)[:, None], torch.cat([shift, torch.zeros(count, 2)], 1), large)
    missed = _placed(people, outside + away, head, generator)
    shuffled = _shuffled(people, generator)
    nothing = plain(count, size, generator)
    pick = kind[:, None, None, None]
    other = torch.where(pick < 2, missed, torch.where(pick == 2, shuffled, nothing))
    seen = torch.where(nobody[:, None, None, None], other, seen)
    # A frame of which the middle is outside, or hardly anything is left, is nobody's either.
    present = ~nobody & (place[:, :2].abs().amax(1) < 0.95)
    return _LOOKS(seen, generator), place, present.float()


def _placed(
    people: Tensor, place: Tensor, head: Tensor | None, generator: torch.Generator
) -> Tensor:
    """People in frames at placements [B, 4] of a larger picture: before what continues theirs, or something else."""
    size = people.shape[-1]
    seen, inside = crop(people, inverse(place), size)
    before = torch.rand(len(people), 1, 1, 1, generator=generator)
    cut = inside
    if head is not None:
        mask = F.interpolate(head[None, None], (size, size), mode="bilinear", antialias=True)
        person = crop(mask.expand(len(people), -1, -1, -1), inverse(place), size, edge="zeros")[0]
        cut = torch.where(before < 0.35, person.clamp(0, 1), inside)
    other = torch.where(
        torch.rand(len(people), 1, 1, 1, generator=generator) < 0.5,
        plain(len(people), size, generator),
        _shuffled(people.flip(0), generator),
    )
    return torch.where(before < 0.6, torch.lerp(other, seen, cut), seen)


def _shuffled(pictures: Tensor, generator: torch.Generator, tiles: int = 4) -> Tensor:
    """Pictures whose tiles lie in another order: all that people are made of, and nobody."""
    size = pictures.shape[-1] // tiles
    blocks = pictures.unflatten(3, (tiles, size)).unflatten(2, (tiles, size))
    flat = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, tiles^2, 3, s, s]
    order = torch.rand(len(pictures), tiles**2, generator=generator).argsort(1)
    mixed = flat[torch.arange(len(flat))[:, None], order].unflatten(1, (tiles, tiles))
    return mixed.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
