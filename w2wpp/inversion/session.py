"""A session: whom to find, where to look and how, in one value, for whoever has a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import NoiseSchedule
from ..errors import ConfigError
from ..identity import Identity
from ..space import Space
from .driver import invert
from .objective import Objective
from .recipes import Recipe, recipe_for
from .solution import Callback, Solution


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

    def to(self, device: torch.device | str) -> Session:
        """The same with its space and pictures on a device."""
        if torch.device(device) == self.space.prior_mean.device == self.pictures.device:
            return self
        return replace(self, space=self.space.to(device), pictures=self.pictures.to(device))

    def solve(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        *,
        micro_batch: int | None = None,
        callback: Callback | None = None,
        checkpoint: Path | None = None,
    ) -> Solution:
        """Look for the person with a model; see `invert` for what a callback and a checkpoint do."""
        recipe = self.recipe
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
            seed=self.seed,
            callback=callback,
            checkpoint=checkpoint,
        )


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
    return Session(space, pictures, recipe.adjusted(**changes), start, mask, seed)


def start_from(
    space: Space, faces: Tensor | None, kind: str = "amortised", *, mask: Tensor | None = None
) -> Identity | None:
    """Where an inversion starts: each person's guess, from all of their pictures; none is the average person.

    faces [n, 3, h, w] of one person or [B, n, 3, h, w] of B, in [-1, 1], with a mask of any size [n or 1, 1, ...] or
    [B, n or 1, 1, ...]: a network that was taught with hidden pixels sees grey where it is black.
    """
    if kind not in ("amortised", "mean"):
        raise ConfigError(f"An inversion starts at 'amortised' or 'mean'. Got {kind!r}.")
    if kind == "mean" or space.start is None or faces is None:
        return None
    people = faces[None] if faces.ndim == 4 else faces
    if mask is not None and space.start.hides:
        people = _hidden(people, mask)
    guessed = space.start_from(people.flatten(0, 1))
    z = guessed.z.unflatten(0, people.shape[:2]).mean(1)
    return replace(guessed, z=z)


def _hidden(people: Tensor, mask: Tensor) -> Tensor:
    """Pictures [B, n, 3, h, w] that are grey where masks are black."""
    mask = (mask[None] if mask.ndim == 4 else mask).to(people)
    times, size = mask.shape[:2], people.shape[-2:]
    flat = mask.flatten(0, 1)
    if flat.shape[-2:] != size:
        flat = F.interpolate(flat, size, mode="bilinear")
    return people * flat.clamp(0, 1).unflatten(0, times)
