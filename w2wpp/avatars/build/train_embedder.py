"""Train the embedder on rendered pictures and measure it on pictures of people it has never seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...precision import quick_products
from ...rates import warm_cosine
from ..world.embedder import AvatarEmbedder
from ..world.renderer import render, sample_identities, sample_nuisance
from .checkpoint import State, load_run, save_run


@dataclass(frozen=True)
class EmbedderTraining:
    """How the embedder is trained."""

    seed: int = 1
    pictures: int = 60_000
    steps: int = 2_500
    batch: int = 128
    learning_rate: float = 2e-3  # peak; linear warm-up, cosine to zero
    blur: float = 0.15  # share of pictures softened by a 3x3 mean: painted faces are softer than rendered ones
    noise: float = 0.04  # largest std of the white noise added to a picture


def train_embedder(
    config: EmbedderTraining,
    *,
    checkpoint: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarEmbedder:
    """Train the embedder. With ``checkpoint`` the run resumes where it stopped."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    identity = sample_identities(config.pictures, generator=generator)
    nuisance = sample_nuisance(config.pictures, generator=generator)
    pictures = render(identity, nuisance).mul(127).round().to(torch.int8)
    model = AvatarEmbedder()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.02)
    state: State = {"model": model, "optimiser": optimiser, "generator": generator}
    step = load_run(checkpoint, state, config=asdict(config))
    while step < config.steps:
        rate = warm_cosine(step, config.steps, warmup=100)
        optimiser.param_groups[0]["lr"] = config.learning_rate * rate
        rows = torch.randint(config.pictures, (config.batch,), generator=generator)
        batch = _soften(pictures[rows].float() / 127, config, generator)
        with quick_products():
            traits, logits, pose = model.read(batch)
        conditions = nuisance[rows]
        loss = F.mse_loss(traits.float(), identity[rows]) + 0.1 * F.mse_loss(
            pose.float(), conditions.pose
        )
        for answer, word in zip(logits, conditions.words().unbind(1)):
            loss = loss + 0.1 * F.cross_entropy(answer.float(), word)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0 or step == config.steps:
            callback(f"embedder step {step}/{config.steps} loss {loss.item():.4f}")
        if step % 500 == 0 or step == config.steps:
            save_run(checkpoint, state, step=step, config=asdict(config))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def measure_embedder(
    embedder: AvatarEmbedder, *, pictures: int = 2_000, seed: int = 10_001
) -> dict[str, float]:
    """Score the embedder on fresh people: mean R2 of the traits, ID score of true pairs and strangers, words."""
    generator = torch.Generator().manual_seed(seed)
    identity = sample_identities(pictures, generator=generator)
    nuisance = sample_nuisance(pictures, generator=generator)
    seen = render(identity, nuisance)
    traits, logits, _ = embedder.read(seen)
    error = (traits - identity).square().mean(0) / identity.var(0)
    truth = F.normalize(identity, dim=1)
    found = F.normalize(traits, dim=1)
    right = [
        (answer.argmax(1) == word).float().mean()
        for answer, word in zip(logits, nuisance.words().unbind(1))
    ]
    return {
        "trait_r2": (1 - error).mean().item(),
        "id_score_truth": (found * truth).sum(1).mean().item(),
        "id_score_stranger": (found * truth.roll(1, 0)).sum(1).mean().item(),
        "background_accuracy": right[0].item(),
        "smile_accuracy": right[1].item(),
        "light_accuracy": right[2].item(),
    }


def _soften(batch: Tensor, config: EmbedderTraining, generator: torch.Generator) -> Tensor:
    soft = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(batch), 1, 1, 1, generator=generator)
    blurred = torch.where(share < config.blur, soft, batch)
    std = config.noise * torch.rand(len(batch), 1, 1, 1, generator=generator)
    return blurred + std * torch.randn(batch.shape, generator=generator)
