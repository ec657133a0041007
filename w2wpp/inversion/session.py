"""A session: whom to find, where to look and how, in one value, for whoever has a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.sampler import sample
from ..diffusion.schedule import Schedule
from ..errors import ConfigError
from ..identity import Identity
from ..space import Space
from .driver import invert
from .objective import Objective
from .recipes import Recipe, recipe_for
from .reread import PAINT_STEPS, reread
from .shown import shown
from .solution import Callback, Solution
from .verdict import confidences

Decode = Callable[[Tensor], Tensor]  # latents [B, C, H, W] to pictures [B, 3, h, w] in [-1, 1]


@dataclass(frozen=True, eq=False)
class Session:
    """An inversion that only lacks its model.

    pictures, as the model sees them: [n, C, H, W] of one person or [B, n, C, H, W] of B people side by side; mask
    [n or 1, 1, H, W], white where they count; start: one identity or B, none for the average person.
    """

    space: Space
    pictures: Tensor
    recipe: Recipe
    start: Identity | None = None
    mask: Tensor | None = None
    seed: int = 0
    faces: Tensor | None = None  # in RGB, where the recipe reads the start again

    def to(self, device: torch.device | str) -> Session:
        """The same with its space and pictures on a device."""
        if torch.device(device) == self.space.prior_mean.device == self.pictures.device:
            return self
        return replace(self, space=self.space.to(device), pictures=self.pictures.to(device))

    def solve(
        self,
        denoise: Denoise,
        schedule: Schedule,
        *,
        micro_batch: int | None = None,
        callback: Callback | None = None,
        checkpoint: Path | None = None,
        decode: Decode | None = None,
    ) -> Solution:
        """Look for the person with a model; see `invert` for what a callback and a checkpoint do.

        `decode` is how latents become pictures, which recipes need that read the start again; ConfigError without.
        """
        recipe = self.recipe
        if recipe.rereads:
            self, spent = self.reread(denoise, schedule, decode, micro_batch=micro_batch)
            found = replace(self, recipe=replace(recipe, rereads=0)).solve(
                denoise, schedule, micro_batch=micro_batch, callback=callback, checkpoint=checkpoint
            )
            return replace(found, evaluations=found.evaluations + spent)
        if recipe.steps == 0 and self.start is not None:
            return Solution(self.start, [], 0, "the start itself", [], 0.0)
        objective = Objective(
            self.space,
            self.pictures,
            denoise,
            schedule,
            seed=self.seed,
            mask=self.mask,
            micro_batch=micro_batch,
            **recipe.objective,
        )
        return invert(
            objective,
            recipe.optimiser,
            steps=recipe.steps,
            start=self.start,
            pivotal=recipe.pivotal,
            keep=recipe.keep,
            along=shown(self.space.start, recipe.shown) if recipe.shown else None,
            seed=self.seed,
            callback=callback,
            checkpoint=checkpoint,
        )

    def reread(
        self,
        denoise: Denoise,
        schedule: Schedule,
        decode: Decode | None,
        *,
        micro_batch: int | None = None,
    ) -> tuple[Session, int]:
        """The same from a start that was painted, read and moved by the difference; and evaluations of each person.

        Raises ConfigError without a start network, faces to read, a start, or a way to decode.
        """
        recipe = self.recipe
        wanted = start_from(self.space, self.faces, mask=self.mask)
        if wanted is None or self.start is None or decode is None:
            raise ConfigError(
                "A recipe that reads the start again needs a space with a start network, the pictures in RGB as faces, "
                "and how latents are decoded."
            )

        def read(z: Tensor) -> Tensor:
            painted = self.painted(denoise, schedule, z, micro_batch=micro_batch)
            guess = start_from(self.space, decode(painted)[:, None], mask=self.mask)
            assert guess is not None
            return guess.z

        times = recipe.rereads
        z = reread(self.start.z, wanted.z, read, times=times, rate=recipe.reread_rate)
        moved = replace(self.start, z=z, provenance={**self.start.provenance, "rereads": times})
        return replace(self, start=moved), times * PAINT_STEPS

    def painted(
        self,
        denoise: Denoise,
        schedule: Schedule,
        z: Tensor,
        residual: Tensor | None = None,
        *,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Latents [B, C, H, W] of paintings of latents z [B, d], all from the same noise.

        residual [B, K]: what of a person is outside of the space, as in `Identity`.
        """
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, *self.pictures.shape[-3:], generator=generator)
        parts, size = [], micro_batch or len(z)
        rest = [None] * len(z) if residual is None else residual.split(size)
        for some, outside in zip(z.split(size), rest):
            with torch.no_grad():
                vectors = self.space.decode(some, outside)
            begin = noise.to(self.pictures).expand(len(some), -1, -1, -1)
            parts.append(
                sample(lambda x, t, v=vectors: denoise(x, t, v), begin, schedule, PAINT_STEPS)  # type: ignore[misc]
            )
        return torch.cat(parts)

    def gain(
        self,
        denoise: Denoise,
        schedule: Schedule,
        found: Identity,
        *,
        draws: int = 8,
        micro_batch: int | None = None,
    ) -> list[float]:
        """Of the average person's loss, the share that the person found is spared, for each of B people.

        Both are seen under the same noise, in twice as many evaluations as there are draws.
        """
        objective = Objective(
            self.space,
            self.pictures,
            denoise,
            schedule,
            seed=self.seed,
            mask=self.mask,
            micro_batch=micro_batch,
            **{**self.recipe.objective, "prior": 0.0},
        )
        draw, device = objective.evaluation(draws), self.space.prior_mean.device
        z = found.z.to(device).expand(objective.people, -1)
        residual = None if found.residual is None else found.residual.to(device)
        with torch.no_grad():
            average = objective.loss(torch.zeros_like(z), None, draw)
            loss = objective.loss(z, residual, draw)
        return (1 - loss / average).tolist()


def session(
    space: Space,
    pictures: Tensor,
    how: str | Recipe,
    *,
    faces: Tensor | None = None,
    start: Identity | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    **changes: Any,
) -> Session:
    """Make an inversion ready. `how` is a method by name, whose recipe then depends on the start, or a recipe.

    `faces` are the pictures in RGB, [n, 3, h, w] or [B, n, 3, h, w] in [-1, 1], for the space's start network; without
    them or without a network the start is the average person. `changes` are those of `Recipe.adjusted`.
    """
    recipe = how
    if isinstance(recipe, str):
        sees = faces is not None or start is not None  # else there is nothing to guess from
        recipe = recipe_for(space if sees else space.with_(start=None), recipe, start)
    if start is None:
        start = start_from(space, faces, recipe.start, mask=mask)
    recipe = recipe.adjusted(**changes)
    seen = faces if recipe.rereads else None
    return Session(space.uncut(), pictures, recipe, start, mask, seed, seen)


def start_from(
    space: Space, faces: Tensor | None, kind: str = "amortised", *, mask: Tensor | None = None
) -> Identity | None:
    """Where an inversion starts: each person's guess, from all of their pictures; none is the average person.

    Pictures count as much as they can be trusted, where a network was taught to tell.

    faces [n, 3, h, w] of one person or [B, n, 3, h, w] of B, in [-1, 1], with a mask of any size [n or 1, 1, ...] or
    [B, n or 1, 1, ...]: a network that was taught with hidden pixels sees grey where it is black.

    Raises ConfigError for another `kind`.
    """
    if kind not in ("amortised", "mean"):
        raise ConfigError(f"An inversion starts at 'amortised' or 'mean'. Got {kind!r}.")
    if kind == "mean" or space.start is None or faces is None:
        return None
    people = faces[None] if faces.ndim == 4 else faces
    if mask is not None and space.start.hides:
        people = _hidden(people, mask)
    flat = people.flatten(0, 1)
    guessed = space.start_from(flat)
    z = guessed.z.unflatten(0, people.shape[:2])  # [B, n, d]
    if people.shape[1] == 1:
        return replace(guessed, z=z[:, 0])
    # Answers are linear in features, so that a mean of answers is the answer to pooled features.
    sure = confidences(space.start, flat.to(space.prior_mean))
    weights = torch.ones(z.shape[:2]) if sure is None else sure.unflatten(0, z.shape[:2])
    weights = (weights / weights.sum(1, keepdim=True)).to(z)
    return replace(guessed, z=(weights[..., None] * z).sum(1))


def _hidden(people: Tensor, mask: Tensor) -> Tensor:
    """Pictures [B, n, 3, h, w] that are grey where masks are black."""
    mask = (mask[None] if mask.ndim == 4 else mask).to(people)
    times, size = mask.shape[:2], people.shape[-2:]
    flat = mask.flatten(0, 1)
    if flat.shape[-2:] != size:
        flat = F.interpolate(flat, size, mode="bilinear")
    return people * flat.clamp(0, 1).unflatten(0, times)
