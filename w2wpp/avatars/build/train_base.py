"""Train the avatar base from nothing but a seed: v-prediction on rendered pictures, with an averaged copy.

Several processes may share each batch: two single-threaded ones are more than twice as fast as one of two threads.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from ...precision import quick_products
from ...rates import warm_cosine
from ..world.base import AvatarBase
from ..world.renderer import (
    EXPRESSION,
    TRAITS,
    Nuisance,
    render,
    sample_identities,
    sample_nuisance,
)
from .checkpoint import State, load_run, save_run


@dataclass(frozen=True)
class Round:
    """A stretch of training with a learning rate of its own: linear warm-up, cosine to zero."""

    steps: int
    batch: int
    learning_rate: float  # peak
    time_power: float  # timesteps are u^power; features of a pixel or two are drawn at low noise
    expression: float = EXPRESSION  # how strongly the pictures smile and frown


# The first round learns what a face is, the others its details.
ROUNDS = (
    Round(steps=3_000, batch=64, learning_rate=1e-3, time_power=1.0, expression=1.0),
    Round(steps=3_600, batch=48, learning_rate=8e-4, time_power=1.5),
    Round(steps=7_200, batch=48, learning_rate=8e-4, time_power=1.5),
)


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained."""

    seed: int = 0
    pictures: int = 40_000  # rendered once a round, every one of another person
    rounds: tuple[Round, ...] = ROUNDS
    warm_up: int = 100  # steps
    average: float = 0.998  # decay of the averaged copy, which is what is kept
    no_prompt: float = 0.1  # share of empty prompts, for classifier-free guidance
    no_word: float = 0.05  # share of each single word left out
    described: float = 0.5  # share of prompts that describe the face


def launch_base(
    config: BaseTraining,
    *,
    processes: int,
    checkpoint: Path,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarBase:
    """Train with batches shared among processes; they log to standard error."""
    if processes > 1:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = Path(folder, "store").as_uri()
            args = (processes, meeting_point, config, checkpoint)
            multiprocessing.spawn(_join, args, nprocs=processes)  # type: ignore[no-untyped-call]
    return train_base(config, checkpoint=checkpoint, callback=callback)


def _join(
    rank: int, processes: int, meeting_point: str, config: BaseTraining, checkpoint: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=processes)
    train_base(
        config,
        checkpoint=checkpoint,
        callback=lambda line: print(line, file=sys.stderr, flush=True),
    )
    dist.destroy_process_group()


def train_base(
    config: BaseTraining,
    *,
    checkpoint: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> AvatarBase:
    """Train and return the averaged model. With ``checkpoint`` the run resumes where it stopped."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    identity = sample_identities(config.pictures, generator=generator)
    nuisance = sample_nuisance(config.pictures, generator=generator)
    model, averaged = AvatarBase(), AvatarBase()
    averaged.load_state_dict(model.state_dict())
    averaged.requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    state: State = {
        "model": model,
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
        pictures = (
            render(identity, nuisance, expression=current.expression)
            .mul(127)
            .round()
            .to(torch.int8)
        )
        while step < first:
            rate = _rate(step - begin, current, config.warm_up)
            optimiser.param_groups[0]["lr"] = current.learning_rate * rate
            rows = torch.randint(config.pictures, (current.batch,), generator=generator)
            prompt = _prompts(model, identity[rows], nuisance[rows], config, generator)
            loss = _loss(model, pictures[rows].float() / 127, prompt, current, generator)
            optimiser.zero_grad()
            loss.backward()
            _average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            _average(averaged, model, min(config.average, step / (step + 10)))
            recent = loss.item() if recent == 0 else 0.98 * recent + 0.02 * loss.item()
            if _rank() == 0 and (step % 100 == 0 or step == last):
                callback(
                    f"base step {step}/{last} loss {recent:.4f} {time.monotonic() - started:.0f} s"
                )
            if _rank() == 0 and (step % 250 == 0 or step == last):
                save_run(checkpoint, state, step=step, config=settings)
    return averaged


def _loss(
    model: AvatarBase, batch: Tensor, prompt: Tensor, current: Round, generator: torch.Generator
) -> Tensor:
    """Mean squared error of v over this process's share of a batch."""
    noise = torch.randn(batch.shape, generator=generator)
    uniform = torch.rand(len(batch), generator=generator)
    timestep = (uniform**current.time_power * 1000).long()
    noisy, target = model.add_noise(batch, noise, timestep)
    share = _share(len(batch))
    with quick_products():
        output = model(noisy[share], timestep[share], prompt[share])
    return (output.float() - target[share]).square().mean()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _share(batch: int) -> slice:
    """This process's rows of a batch."""
    if not dist.is_initialized():
        return slice(0, batch)
    size = batch // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def _average_gradients(model: AvatarBase) -> None:
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
    return warm_cosine(step, current.steps, warmup=warm_up)


def _prompts(
    model: AvatarBase,
    identity: Tensor,
    nuisance: Nuisance,
    config: BaseTraining,
    generator: torch.Generator,
) -> Tensor:
    """Prompts [B, 4, context] with words left out at random and some faces described in part."""
    count = len(identity)

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    words = torch.where(chance(count, 3) < config.no_word, -1, nuisance.words())
    told = (chance(count, len(TRAITS)) < chance(count, 1)) & (chance(count, 1) < config.described)
    prompt = model.described(model.prompt(words), identity, told.float())
    empty = chance(count, 1, 1) < config.no_prompt
    return torch.where(empty, model.unconditional(count), prompt)


@torch.no_grad()
def _average(averaged: AvatarBase, model: AvatarBase, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
