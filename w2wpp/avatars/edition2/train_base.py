"""Train the avatar base from nothing but a seed: v-prediction on latents of rendered pictures, with an averaged copy.

Several processes may share each batch: two single-threaded ones are more than twice as fast as one of two threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from ...precision import quick_products
from ...training import checkpoint as files
from ..build.checkpoint import State, load_run, save_run
from .base import AvatarBase, load_base
from .renderer import render
from .scene import TRAITS, Scene, face_map, face_weights, sample_identities, sample_scenes
from .vae import load_vae

SAVED_EVERY = 250  # steps


@dataclass(frozen=True)
class Round:
    """A stretch of training with a learning rate of its own: linear warm-up, cosine to zero."""

    steps: int
    batch: int
    learning_rate: float  # peak
    time_power: float  # timesteps are u^power: details are drawn at low noise


# Small batches: so early the number of steps counts for more than the noise of their gradients.
ROUNDS = (Round(steps=13_000, batch=32, learning_rate=2e-3, time_power=1.0),)


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained."""

    seed: int = 0
    pictures: int = 20_000  # rendered once, every one of another person
    rounds: tuple[Round, ...] = ROUNDS
    warm_up: int = 100  # steps
    average: float = 0.998  # decay of the averaged copy, which is what is kept
    no_prompt: float = 0.1  # share of empty prompts, for classifier-free guidance
    no_word: float = 0.05  # share of each single word left out
    described: float = 0.7  # share of prompts that describe the face
    face_share: float = 0.6  # of the loss; the rest is spread evenly
    guided: float = 1.0  # weight of what the middle of the UNet is asked for; 0: nothing
    compiled: bool = False  # a third faster, where there is a C++ compiler
    start: str = (
        ""  # file of a base to go on from, with another seed's pictures; without one, from nothing
    )


def launch_base(
    config: BaseTraining,
    *,
    processes: int,
    vae: Path,
    checkpoint: Path,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarBase:
    """Train with batches shared among processes; they log to standard error.

    ``vae`` is the autoencoder's file. Latents of the pictures are kept beside ``checkpoint``.
    """
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    cache = checkpoint.with_suffix(".latents")
    latents = cached_latents(config, vae, cache, processes=processes, callback=callback)
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = Path(folder, "store").as_uri()
            args = (processes, meeting_point, config, latents, checkpoint)
            multiprocessing.spawn(_join, args, nprocs=processes)  # type: ignore[no-untyped-call]
    return train_base(config, latents, checkpoint=checkpoint, callback=callback)


def _join(
    rank: int,
    processes: int,
    meeting_point: str,
    config: BaseTraining,
    latents: Tensor,
    checkpoint: Path,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=processes)
    train_base(
        config,
        latents,
        checkpoint=checkpoint,
        callback=lambda line: print(line, file=sys.stderr, flush=True),
    )
    dist.destroy_process_group()


def cached_latents(
    config: BaseTraining,
    vae: Path,
    cache: Path,
    *,
    processes: int = 1,
    callback: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """Latents [pictures, 4, h, w] of the training pictures, half precision; read from ``cache`` when it fits."""
    run = json.dumps({"seed": config.seed, "pictures": config.pictures, "vae": file_digest(vae)})
    if cache.exists():
        return files.load_checkpoint(cache, run)[0]["latents"]
    identity, scene = _people(config, torch.Generator().manual_seed(config.seed))
    jobs = [(vae, identity[rows], scene[rows]) for rows in torch.arange(config.pictures).split(500)]
    parts: list[Tensor] = []
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for part in pool.imap(_rendered, jobs):
            parts.append(part)
            callback(f"base picture {sum(map(len, parts))}/{config.pictures}")
    latents = torch.cat(parts)
    files.save_checkpoint(cache, run, {"latents": latents}, {})
    return latents


@torch.no_grad()
def _rendered(job: tuple[Path, Tensor, Scene]) -> Tensor:
    """Latents of some people, rendered."""
    path, identity, scene = job
    vae = load_vae(path)
    return torch.cat([vae.encode(part) for part in render(identity, scene).split(50)]).half()


def _people(config: BaseTraining, generator: torch.Generator) -> tuple[Tensor, Scene]:
    identity = sample_identities(config.pictures, generator=generator)
    return identity, sample_scenes(config.pictures, generator=generator)


class Guides(nn.Module):
    """What the middle of the UNet is asked for while it trains: the clean latents, and where the face is.

    Both are read by one linear layer, which is thrown away afterwards (deep supervision: Lee et al. 2015). Small models
    learn by it in fewer steps that a picture has a face in one place.
    """

    LATENTS, PLACE = 0.5, 1.0  # weights

    def __init__(self, base: AvatarBase) -> None:
        super().__init__()
        config = base.config
        self.fold = 2 ** (len(config.channels) - 1)  # latents per side that the middle sees as one
        self.told = config.latent_channels * self.fold**2
        self.head = nn.Conv2d(config.channels[-1], self.told + 3, 1)
        self._middle = torch.empty(0)
        base.unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, middle: Tensor) -> None:
        self._middle = middle

    def forward(self, latents: Tensor, placement: Tensor) -> Tensor:
        """How far the last pass was from clean latents [B, C, h, w] of faces at placements [B, 4]."""
        answer = self.head(F.silu(self._middle.float()))
        told = F.pixel_unshuffle(latents, self.fold)
        place = face_map(placement, told.shape[-1])
        picture, where = answer.split([self.told, 3], dim=1)
        return self.LATENTS * F.mse_loss(picture, told) + self.PLACE * F.mse_loss(where, place)


def train_base(
    config: BaseTraining,
    latents: Tensor,
    *,
    checkpoint: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarBase:
    """Train on ``latents`` [pictures, 4, h, w] and return the averaged model.

    With ``checkpoint`` the run resumes where it stopped.
    """
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    identity, scene = _people(config, generator)
    model, averaged = AvatarBase(), AvatarBase()
    if config.start:
        model.load_state_dict(load_base(config.start).state_dict())
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False).eval()
    guides = Guides(model)
    trained = nn.ModuleList([model, guides])
    if config.compiled:
        model.unet.compile()
    optimiser = torch.optim.AdamW(trained.parameters(), weight_decay=0.01, fused=True)
    state: State = {
        "model": model,
        "guides": guides,
        "averaged": averaged,
        "optimiser": optimiser,
        "generator": generator,
    }
    settings = asdict(config)
    step = load_run(checkpoint, state, config=settings)
    started, recent, first = time.monotonic(), 0.0, 0
    last = sum(r.steps for r in config.rounds)
    for current in config.rounds:
        first, begin = first + current.steps, first
        if step >= first:
            continue
        while step < first:
            rate = _rate(step - begin, current, config.warm_up)
            optimiser.param_groups[0]["lr"] = current.learning_rate * rate
            rows = torch.randint(config.pictures, (current.batch,), generator=generator)
            batch, shown = latents[rows].float(), scene[rows]
            prompt = _prompts(model, identity[rows], shown, config, generator)
            weights = face_weights(shown, latents.shape[-1], config.face_share)
            loss = _loss(model, batch, weights, prompt, current, generator)
            share = _share(len(rows))
            asked = guides(batch[share], shown.placement()[share])
            optimiser.zero_grad()
            (loss + config.guided * asked).backward()
            _average_gradients(trained)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimiser.step()
            step += 1
            _average(averaged, model, min(config.average, step / (step + 10)))
            recent = loss.item() if recent == 0 else 0.98 * recent + 0.02 * loss.item()
            if _rank() == 0 and (step % 100 == 0 or step == last):
                callback(
                    f"base step {step}/{last} loss {recent:.4f} {time.monotonic() - started:.0f} s"
                )
            if _rank() == 0 and (step % SAVED_EVERY == 0 or step == last):
                save_run(checkpoint, state, step=step, config=settings)
    return averaged


def _loss(
    model: AvatarBase,
    batch: Tensor,
    weights: Tensor,
    prompt: Tensor,
    current: Round,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of v, weighted over the picture, over this process's share of a batch."""
    noise = torch.randn(batch.shape, generator=generator)
    uniform = torch.rand(len(batch), generator=generator)
    timestep = (uniform**current.time_power * 1000).long()
    noisy, target = model.schedule.add_noise(batch, noise, timestep)
    share = _share(len(batch))
    with quick_products():
        output = model(noisy[share], timestep[share], prompt[share])
    return (weights[share] * (output.float() - target[share]).square()).mean()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _share(batch: int) -> slice:
    """This process's rows of a batch."""
    if not dist.is_initialized():
        return slice(0, batch)
    size = batch // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def _average_gradients(model: nn.Module) -> None:
    if not dist.is_initialized():
        return
    # A process whose share used no described prompt has no gradient for that layer, but must send one.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(model.parameters(), flat.split([g.numel() for g in gradients])):
        parameter.grad = part.view_as(parameter)


def _rate(step: int, current: Round, warm_up: int) -> float:
    warm = min(1.0, (step + 1) / warm_up)
    return warm * 0.5 * (1 + math.cos(math.pi * step / current.steps))


def _prompts(
    model: AvatarBase,
    identity: Tensor,
    scene: Scene,
    config: BaseTraining,
    generator: torch.Generator,
) -> Tensor:
    """Prompts [B, 5, context] with words left out at random and some faces described in part."""
    count = len(identity)

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    words = scene.words()
    words = torch.where(chance(*words.shape) < config.no_word, -1, words)
    told = (chance(count, len(TRAITS)) < chance(count, 1)) & (chance(count, 1) < config.described)
    prompt = model.described(model.prompt(words), identity, told.float())
    empty = chance(count, 1, 1) < config.no_prompt
    return torch.where(empty, model.unconditional(count), prompt)


@torch.no_grad()
def _average(averaged: AvatarBase, model: AvatarBase, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
