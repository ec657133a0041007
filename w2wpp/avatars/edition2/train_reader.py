"""Train a reader on rendered pictures, and measure it on pictures of people it has never seen.

Faces are shown at more places, sizes and turns, and under more light, than scenes have: a reader must find the face in
a picture as it comes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...precision import quick_products
from ..build.checkpoint import State, load_run, save_run
from .framing import WINDOW, compose, crop, inverse
from .reader import LOOK_SIZE, PLACEMENT, SECOND_LOOK, AvatarReader
from .renderer import render, render_empty
from .scene import WORDS, sample_identities, sample_scenes


@dataclass(frozen=True)
class ReaderTraining:
    """How a reader is trained."""

    make: str = "conv"
    seed: int = 1
    pictures: int = 16_000
    empty: int = 2_000  # places without a person
    steps: int = 2_500
    batch: int = 64
    learning_rate: float = 2e-3  # peak; linear warm-up, cosine to zero
    moved: float = 0.6  # share of pictures whose frame is moved, turned and scaled
    nobody: float = 0.08  # share of places without a person
    blur: float = 0.3  # share of pictures softened: painted faces are softer than rendered ones
    noise: float = 0.04  # largest std of the white noise added to a picture
    gain: float = 0.4  # largest change of exposure


TRAININGS = {
    "conv": ReaderTraining(),
    "mixer": ReaderTraining(make="mixer", seed=11, learning_rate=1e-3),
}


@dataclass(frozen=True)
class _Album:
    """Rendered pictures, a byte a number, with everything there is to know of them. Rows without a person come last."""

    pictures: Tensor  # [N, 3, S, S] round(127 x)
    identity: Tensor  # [N, 20]
    placement: Tensor  # [N, 4]
    words: Tensor  # [N, 4]
    people: int  # rows that show somebody


def train_reader(
    config: ReaderTraining,
    *,
    checkpoint: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarReader:
    """Train the reader. With ``checkpoint`` the run resumes where it stopped."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    album = _album(config, generator)
    model = AvatarReader(config.make)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.02)
    state: State = {"model": model, "optimiser": optimiser, "generator": generator}
    step, started, recent = (
        load_run(checkpoint, state, config=asdict(config)),
        time.monotonic(),
        0.0,
    )
    while step < config.steps:
        warm = min(1.0, (step + 1) / 100)
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimiser.param_groups[0]["lr"] = config.learning_rate * rate
        loss = _loss(model, album, config, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        recent = loss.item() if recent == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == config.steps:
            seconds = time.monotonic() - started
            callback(
                f"reader {config.make} step {step}/{config.steps} loss {recent:.4f} {seconds:.0f} s"
            )
        if step % 500 == 0 or step == config.steps:
            save_run(checkpoint, state, step=step, config=asdict(config))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def measure_reader(
    reader: AvatarReader, *, pictures: int = 1_000, seed: int = 10_001
) -> dict[str, float]:
    """Score the reader on fresh people in scenes of the world: traits, ID of true pairs and strangers, words, place."""
    generator = torch.Generator().manual_seed(seed)
    identity = sample_identities(pictures, generator=generator)
    scene = sample_scenes(pictures, generator=generator)
    readings = [
        reader.read(render(identity[rows], scene[rows]))
        for rows in torch.arange(pictures).split(100)
    ]
    traits = torch.cat([r.traits for r in readings])
    placement = torch.cat([r.placement for r in readings])
    words = {slot: torch.cat([r.words[slot] for r in readings]).argmax(1) for slot in WORDS}
    truth, found = F.normalize(identity, dim=1), F.normalize(traits, dim=1)
    score, close = (found * truth).sum(1), scene.framing == 0
    off = (placement - scene.placement()).abs().mean(0)
    return {
        "trait_r2": (1 - (traits - identity).square().mean(0) / identity.var(0)).mean().item(),
        "id_score_truth": score.mean().item(),
        "id_score_truth_close": score[close].mean().item(),
        "id_score_truth_wide": score[~close].mean().item(),
        "id_score_stranger": (found * truth.roll(1, 0)).sum(1).mean().item(),
        **{
            f"{slot}_accuracy": (words[slot] == getattr(scene, slot)).float().mean().item()
            for slot in WORDS
        },
        **dict(zip(("right_error", "down_error", "log_scale_error", "turn_error"), off.tolist())),
    }


def _album(config: ReaderTraining, generator: torch.Generator) -> _Album:
    identity = sample_identities(config.pictures + config.empty, generator=generator)
    scene = sample_scenes(config.pictures + config.empty, generator=generator)
    pictures = []
    for rows in torch.arange(config.pictures).split(256):
        pictures.append(render(identity[rows], scene[rows]).mul(127).round().to(torch.int8))
    rest = torch.arange(config.pictures, config.pictures + config.empty)
    pictures.append(render_empty(scene[rest]).mul(127).round().to(torch.int8))
    placement, words = scene.placement(), scene.words()
    return _Album(torch.cat(pictures), identity, placement, words, config.pictures)


def _loss(
    model: AvatarReader, album: _Album, config: ReaderTraining, generator: torch.Generator
) -> Tensor:
    """Every question at once: the locator's two looks, the face, the words."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = config.batch
    somebody = torch.randint(album.people, (count,), generator=generator)
    nobody = torch.randint(album.people, len(album.pictures), (count,), generator=generator)
    present = chance(count) >= config.nobody
    rows = torch.where(present, somebody, nobody)
    pictures = _expose(album.pictures[rows].float() / 127, config, generator)
    placement = album.placement[rows]

    # The frame itself is moved over the picture: faces anywhere, of any size, turned by half a radian and more.
    frame = normal(count, PLACEMENT).clamp(-2, 2) * torch.tensor([0.3, 0.3, 0.3, 0.3])
    frame = torch.where(chance(count, 1) < config.moved, frame, torch.zeros_like(frame))
    whole = crop(pictures, frame, LOOK_SIZE, window=1.0)
    seen = compose(inverse(frame), placement)

    # Where a first look might believe the face to be, and where a second one might.
    spread = torch.tensor([0.12, 0.12, 0.15, 0.12])
    scale = placement[:, 2:3].exp()
    unit = torch.cat([scale, scale, torch.ones(count, 2)], dim=1)
    guess = placement + spread * unit * normal(count, PLACEMENT)
    again = crop(pictures, guess, LOOK_SIZE, window=SECOND_LOOK)
    target = _in_window(compose(inverse(guess), placement))
    settled = placement + 0.25 * spread * unit * normal(count, PLACEMENT)
    face = crop(pictures, settled, LOOK_SIZE, window=WINDOW)

    with quick_products():
        first, second, answers = model.locator(whole), model.locator(again), model.face(face)
    here = present.float()[:, None]
    located = (first["place"].float() - seen).square() + 4 * (
        second["place"].float() - target
    ).square()
    loss = (located * here).mean()
    loss = loss + ((answers["traits"].float() - album.identity[rows]).square() * here).mean()
    logit = first["present"].float()[:, 0]
    loss = loss + 0.1 * F.binary_cross_entropy_with_logits(logit, present.float())
    for slot, answer in {**answers, **first}.items():
        if slot in WORDS:
            word = album.words[rows][:, list(WORDS).index(slot)]
            still = (frame == 0).all(1) | (slot not in ("framing",))
            wrong = F.cross_entropy(answer.float(), word, reduction="none")
            told = present | (slot == "background")
            loss = loss + 0.1 * (wrong * (still & told)).mean()
    return loss


def _in_window(placement: Tensor) -> Tensor:
    """A placement in face units -> in the half frames of a second look."""
    log = math.log(SECOND_LOOK)
    return torch.cat(
        [placement[:, :2] / SECOND_LOOK, placement[:, 2:3] - log, placement[:, 3:]], dim=1
    )


def _expose(batch: Tensor, config: ReaderTraining, generator: torch.Generator) -> Tensor:
    """Softer, noisier, brighter and darker pictures."""

    def chance() -> Tensor:
        return torch.rand(len(batch), 1, 1, 1, generator=generator)

    soft = F.avg_pool2d(F.pad(batch, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    batch = torch.where(chance() < config.blur, torch.lerp(batch, soft, chance()), batch)
    gain = 1 + config.gain * (2 * chance() - 1) * (chance() < 0.5)
    batch = ((batch + 1) * gain - 1).clamp(-1, 1)
    std = config.noise * chance()
    return batch + std * torch.randn(batch.shape, generator=generator)
