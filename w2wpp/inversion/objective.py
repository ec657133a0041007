"""What an inversion minimises: how badly a latent's LoRA denoises the pictures of a person.

Letters: B people, R rows of latents (R is a multiple of B, ordered by person), M draws (picture, noise, timestep) of
each person, n pictures of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError, DataError, ShapeError, check_finite
from ..space import Space
from .checkpoint import digest


@dataclass(frozen=True, eq=False)
class Draw:
    """The random part of the loss: M draws for each of B people."""

    picture: Tensor  # [B, M] which of a person's pictures
    noise: Tensor  # [B, M, C, H, W]
    timestep: Tensor  # [B, M]

    @property
    def size(self) -> int:
        """M."""
        return self.timestep.shape[1]


class Objective:
    """The denoising loss (Ho et al. 2020) of latents and residuals, with common random numbers.

    `pictures` are latents of the host's VAE, encoded once: [n, C, H, W] of one person, or
    [B, n, C, H, W] of B people inverted side by side, each as if alone.
    """

    def __init__(
        self,
        space: Space,
        pictures: Tensor,
        denoise: Denoise,
        schedule: Schedule,
        *,
        draws: int = 8,  # M
        seed: int = 0,
        fresh: bool = False,  # new draws in every step, else the same ones
        stratified: bool = True,  # timesteps spread evenly over the schedule
        weighting: str = "native",  # see Schedule.weights
        mask: Tensor | None = None,  # [n or 1, 1, H, W], what of the pictures counts
        prior: float = 0.0,  # weight of |z|^2 / 2
        micro_batch: int | None = None,  # most pictures that go through the UNet at once
    ) -> None:
        if pictures.ndim not in (4, 5) or 0 in pictures.shape:
            raise ShapeError(
                "Pictures are [n, C, H, W] of one person, or [B, n, C, H, W] of B people. Got "
                f"{list(pictures.shape)}."
            )
        if not bool(torch.isfinite(pictures).all()):
            raise DataError("The pictures to invert hold NaN or infinite numbers.")
        check_finite("An objective", prior=prior)
        if draws < 1 or not prior >= 0 or (micro_batch is not None and micro_batch < 1):
            raise ConfigError(
                "Draws and a micro batch are at least 1, and the prior is not negative. Got "
                f"{draws=}, {prior=}, {micro_batch=}."
            )
        self.space, self.denoise, self.schedule = space, denoise, schedule
        self.pictures = (pictures[None] if pictures.ndim == 4 else pictures).detach()
        self.draws, self.seed, self.fresh = draws, seed, fresh
        self.stratified, self.prior, self.micro_batch = stratified, prior, micro_batch
        # Hosts run in inference mode, and what is made there can't take part in gradients.
        with torch.inference_mode(False):
            self.mask = None if mask is None else self._mask(mask.clone())
            weights = schedule.weights(weighting).float().to(self.pictures.device)  # [T]
            self.weights = weights.clone()
        self.rows_evaluated = 0  # pictures that went through the UNet

    @property
    def people(self) -> int:
        """B."""
        return len(self.pictures)

    @property
    def evaluations(self) -> int:
        """Pictures that went through the UNet, per person; forward, or forward and backward."""
        return self.rows_evaluated // self.people

    def digest(self) -> str:
        """32 hex digits over all that decides the loss, but for the model behind `denoise`.

        A model that can be told from others has a `fingerprint` of its own, which counts too.
        """
        facts = {
            "space": self.space.fingerprint,
            "prediction": self.schedule.prediction,
            "model": getattr(self.denoise, "fingerprint", ""),
            **{n: getattr(self, n) for n in ("draws", "seed", "fresh", "stratified", "prior")},
        }
        tensors = {
            "pictures": self.pictures,
            "mask": self.mask,
            "weights": self.weights,
            **self.schedule.tensors(),
        }
        return digest(facts, tensors)

    def draw(self, step: int) -> Draw:
        """The draws of a step; of every step the same ones unless `fresh`."""
        return self._draw(2 + step if self.fresh else 0, self.draws)

    def evaluation(self, draws: int) -> Draw:
        """Draws kept aside, by which points of different steps are compared."""
        return self._draw(1, draws)

    def loss(self, z: Tensor, residual: Tensor | None, draw: Draw) -> Tensor:
        """z [R, d], residual [R, K] or none -> [R]. Differentiable."""
        total = self._penalty(z)
        vectors = self.space.decode(z, residual)
        for rows, part in self._chunks(len(z), draw):
            piece = self._denoising(vectors[rows], rows, part, len(z)) * (part.size / draw.size)
            total = total.index_add(0, torch.arange(len(z), device=z.device)[rows], piece)
        return total

    def value_and_gradient(
        self, z: Tensor, residual: Tensor | None, draw: Draw, *, of_residual: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses [R] and the gradient of each in its own latent [R, d] (or residual [R, K]).

        The space decodes once; micro batches free their graphs one after the other.
        """
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_(not of_residual)
            if residual is not None:
                residual = residual.detach().clone().requires_grad_(of_residual)
            unknown = residual if of_residual else z
            assert unknown is not None
            vectors = self.space.decode(z, residual)  # [R, P]
            leaf = vectors.detach().requires_grad_(True)
            by_vector, losses = torch.zeros_like(leaf), torch.zeros_like(leaf[:, 0].detach())
            for rows, part in self._chunks(len(z), draw):
                piece = self._denoising(leaf[rows], rows, part, len(z)) * (part.size / draw.size)
                (gradient,) = torch.autograd.grad(piece.sum(), leaf)
                by_vector += gradient
                losses[rows] += piece.detach()
            (gradient,) = torch.autograd.grad(vectors, unknown, by_vector)
            if not of_residual:
                gradient = gradient + self.prior * z.detach()
            return losses + self._penalty(z.detach()), gradient.detach()

    def _penalty(self, z: Tensor) -> Tensor:
        """-log N(z; 0, I) up to a constant, weighted [R]."""
        return self.prior * 0.5 * z.square().sum(1)

    def _denoising(self, vectors: Tensor, rows: slice, draw: Draw, total: int) -> Tensor:
        """Vectors [r, P] of some rows -> mean weighted squared error over their draws [r]."""
        people = (torch.arange(total)[rows] // (total // self.people)).to(draw.picture.device)
        shown = (people[:, None], draw.picture[people])
        x0, noise, timestep = (
            rearrange(part, "r m ... -> (r m) ...")
            for part in (self.pictures[shown], draw.noise[people], draw.timestep[people])
        )
        noisy, target = self.schedule.add_noise(x0, noise, timestep)
        self.rows_evaluated += len(noisy)
        predicted = self.denoise(noisy, timestep, vectors)
        if predicted.dtype in (torch.float16, torch.bfloat16):
            predicted = predicted.float()
        error = (predicted - target.to(predicted)).square()
        if self.mask is not None:
            error = error * rearrange(self.mask[shown], "r m ... -> (r m) ...")
        by_draw = reduce(error, "n c h w -> n", "mean") * self.weights[timestep]
        return reduce(by_draw.to(vectors.device), "(r m) -> r", "mean", r=len(people))

    def _chunks(self, rows: int, draw: Draw) -> Iterator[tuple[slice, Draw]]:
        """Rows and draws in pieces of at most `micro_batch` pictures."""
        limit = self.micro_batch or rows * draw.size
        width = min(draw.size, limit)
        height = max(1, limit // width)
        for top in range(0, rows, height):
            for left in range(0, draw.size, width):
                span = slice(left, left + width)
                part = Draw(draw.picture[:, span], draw.noise[:, span], draw.timestep[:, span])
                yield slice(top, min(top + height, rows)), part

    def _draw(self, number: int, size: int) -> Draw:
        drawn = [self._draw_one(number, size, person) for person in range(self.people)]
        return Draw(*(torch.stack(part).to(self.pictures.device) for part in zip(*drawn)))

    def _draw_one(self, number: int, size: int, person: int) -> tuple[Tensor, Tensor, Tensor]:
        """[M], [M, C, H, W], [M] from a generator of their own, so that a run can resume anywhere."""
        mixed = ((self.seed * 100_003 + person) * 100_003 + number) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        noise = torch.randn(size, *self.pictures.shape[2:], generator=generator)
        u = torch.rand(size, generator=generator)
        if self.stratified:
            u = (torch.randperm(size, generator=generator) + u) / size
        timestep = (u * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)
        count = self.pictures.shape[1]
        picture = torch.randperm(count, generator=generator)[torch.arange(size) % count]
        return picture, noise, timestep

    def _mask(self, mask: Tensor) -> Tensor:
        """[B, n, 1, H, W] with mean one over each picture."""
        people, count, _, *size = self.pictures.shape
        mask = mask[None] if mask.ndim == 4 else mask
        if mask.ndim != 5 or mask.shape[1] not in (1, count) or list(mask.shape[2:]) != [1, *size]:
            raise ShapeError(
                f"A mask for these pictures is [{count} or 1, 1, {size[0]}, {size[1]}]. Got "
                f"{list(mask.shape[1:])}."
            )
        mask = mask.to(self.pictures).clamp(0, 1)
        mean = mask.mean((-2, -1), keepdim=True)
        if not bool((mean > 0).all()):
            raise ConfigError("The mask leaves nothing of a picture. Paint what shows the person.")
        return (mask / mean).expand(people, count, -1, -1, -1)
