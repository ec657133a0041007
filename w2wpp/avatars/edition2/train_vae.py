"""Train the avatars' autoencoder on rendered pictures, and measure it on people it has never seen.

Most of a picture is wall and shirt, which are learned at once; who somebody is sits in a few dozen pixels. So training
mostly looks at squares around the faces, a quarter of a picture at a quarter of the cost, and now and then at a whole.
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
from .framing import crop
from .renderer import IMAGE_SIZE, render
from .scene import Scene, sample_identities, sample_scenes
from .vae import AvatarVae

REPORT_EVERY = 250  # steps


@dataclass(frozen=True)
class VaeTraining:
    """How the autoencoder is trained."""

    seed: int = 4
    pictures: int = 12_000  # rendered once, every one of another person
    steps: int = 22_000
    batch: int = 16  # squares around faces a step; of whole pictures a quarter
    square: int = 64  # pixels per side of such a square
    whole: float = 0.1  # share of steps that see whole pictures
    learning_rate: float = 2e-3  # peak; linear warm-up, cosine to zero
    average: float = 0.998  # decay of the averaged copy, which is what is kept
    absolute: float = 0.1  # weight of the mean absolute error beside the squared one: crisper edges
    kl: float = 2e-5  # weight of the KL per latent: latents stay compact, and decoding forgives small errors
    warm_up: int = 200  # steps


def train_vae(
    config: VaeTraining,
    *,
    checkpoint: Path | None = None,
    every: int = 1_000,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarVae:
    """Train and return the averaged model.

    With ``checkpoint``, written ``every`` so many steps, the run resumes where it stopped.
    """
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    pictures, scene = rendered(config.pictures, generator)
    faces = _pixels(scene.placement()[:, :2])
    model, averaged = AvatarVae(), AvatarVae()
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    state: State = {
        "model": model, "averaged": averaged, "optimiser": optimiser, "generator": generator
    }  # fmt: skip
    step = load_run(checkpoint, state, config=asdict(config))
    started, recent = time.monotonic(), 0.0
    while step < config.steps:
        warm = min(1.0, (step + 1) / config.warm_up)
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimiser.param_groups[0]["lr"] = config.learning_rate * rate
        batch = _batch(pictures, faces, config, generator)
        loss, error = _loss(model, batch, config, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(config.average, step / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        recent = error if recent == 0 else 0.98 * recent + 0.02 * error
        if step % REPORT_EVERY == 0 or step == config.steps:
            seconds = time.monotonic() - started
            callback(f"vae step {step}/{config.steps} PSNR {psnr(recent):.2f} dB {seconds:.0f} s")
        if step % every == 0 or step == config.steps:
            save_run(checkpoint, state, step=step, config=asdict(config))
    _normalise(averaged, pictures[:2_000])
    return averaged


def rendered(count: int, generator: torch.Generator) -> tuple[Tensor, Scene]:
    """Pictures [count, 3, S, S] of ``count`` people, a byte a number: round(127 x), and how they were taken."""
    identity = sample_identities(count, generator=generator)
    scene = sample_scenes(count, generator=generator)
    parts = [
        render(identity[rows], scene[rows]).mul(127).round().to(torch.int8)
        for rows in torch.arange(count).split(256)
    ]
    return torch.cat(parts), scene


def _pixels(position: Tensor) -> Tensor:
    """Positions in half frames -> pixels."""
    return (position + 1) / 2 * IMAGE_SIZE


def _batch(
    pictures: Tensor, faces: Tensor, config: VaeTraining, generator: torch.Generator
) -> Tensor:
    """[B, 3, h, w] in [-1, 1], half of them mirrored: squares around ``faces`` [N, 2] or whole pictures."""
    count, side = config.batch, config.square
    if torch.rand((), generator=generator) < config.whole:
        count, side = max(1, config.batch * side**2 // IMAGE_SIZE**2), IMAGE_SIZE
    rows = torch.randint(len(pictures), (count,), generator=generator)
    astray = torch.randn(count, 2, generator=generator) * side / 4
    corner = (faces[rows] + astray - side / 2).round().long().clamp(0, IMAGE_SIZE - side)
    parts = [
        pictures[row, :, top : top + side, left : left + side]
        for row, (left, top) in zip(rows.tolist(), corner.tolist())
    ]
    batch = torch.stack(parts).float() / 127
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, batch.flip(3), batch)


def psnr(squared_error: float) -> float:
    """Peak signal to noise in decibels of a mean squared error in [-1, 1] units."""
    return 10 * math.log10(4 / squared_error)


@torch.no_grad()
def measure_vae(vae: AvatarVae, *, pictures: int = 500, seed: int = 10_004) -> dict[str, float]:
    """PSNR on fresh people (mean over pictures, and the worst twentieth), and the latents' std."""
    bytes_, scene = rendered(pictures, torch.Generator().manual_seed(seed))
    seen = bytes_.float() / 127
    latents = torch.cat([vae.encode(part) for part in seen.split(50)])
    back = torch.cat([vae.decode(part) for part in latents.split(50)])
    each = 10 * torch.log10(4 / (back - seen).square().mean((1, 2, 3)))
    heads = [crop(part, scene.placement(), 64) for part in (seen, back)]
    head = 10 * torch.log10(4 / (heads[0] - heads[1]).square().mean((1, 2, 3)))
    return {
        "psnr": each.mean().item(),
        "psnr_worst_twentieth": each.quantile(0.05).item(),
        "psnr_heads_close": head[scene.framing == 0].mean().item(),
        "psnr_heads_wide": head[scene.framing == 1].mean().item(),
        "latent_std": latents.std().item(),
    }


def _loss(
    model: AvatarVae, batch: Tensor, config: VaeTraining, generator: torch.Generator
) -> tuple[Tensor, float]:
    """The evidence bound's two parts, each a mean per number, and the squared error by itself."""
    noise = torch.randn(
        len(batch), 4, batch.shape[2] // 8, batch.shape[3] // 8, generator=generator
    )
    with quick_products():
        mean, log_variance = (part.float() for part in model.posterior(batch))
        back = model.decode_raw(mean + (0.5 * log_variance).exp() * noise).float()
    squared, absolute = F.mse_loss(back, batch), F.l1_loss(back, batch)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return squared + config.absolute * absolute + config.kl * kl, squared.item()


@torch.no_grad()
def _normalise(vae: AvatarVae, pictures: Tensor) -> None:
    """Set shift and scale so that latents of avatars have mean zero and unit std per channel."""
    raw = torch.cat([vae.posterior(part.float() / 127)[0] for part in pictures.split(50)])
    vae.shift.copy_(raw.mean((0, 2, 3)))
    vae.scale.copy_(raw.std((0, 2, 3)))
