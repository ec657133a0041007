"""Many people painted in one pass through the host's sampler: each row of the batch is somebody else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ...w2wpp import Identity, Layout, Space
from ...w2wpp.lora.hooks import hooked as lora_hooks
from . import gallery, tensors
from .easel import SAMPLER, SCHEDULER, decoded, latent_shape, rows_at_once, side_of
from .fingerprints import fingerprint, model_fingerprint, vae_fingerprint
from .model import check_fit, reorder, sites_of

AT_ONCE = 4  # a row of the usual grid: what is lost at most when somebody presses Cancel
LARGEST = 384  # side that faces are painted at unless somebody says otherwise


@dataclass(frozen=True)
class Studio:
    """What faces are painted with, and how."""

    model: Any
    vae: Any
    positive: list
    negative: list | None
    size: int  # side in pixels; 0 for the model's own, up to LARGEST
    steps: int
    cfg: float
    seed: int

    @property
    def side(self) -> int:
        """Side of the pictures in pixels, a multiple of what the UNet needs."""
        return side_of(self.model, self.size, LARGEST)

    @property
    def guidance(self) -> float:
        """The scale of guidance; 1, none, without a negative prompt."""
        return self.cfg if self.negative is not None else 1.0

    def fingerprint(self) -> str:
        """Names all that decides a picture, beside the person."""
        how = [self.side, self.steps, self.guidance, self.seed, SAMPLER, SCHEDULER]
        prompts = [self.positive, self.negative]
        return fingerprint(model_fingerprint(self.model), vae_fingerprint(self.vae), prompts, how)


def face_keys(people: Identity, studio: Studio) -> list[str]:
    """The names that the faces of people are kept under."""
    how, residual = studio.fingerprint(), people.residual
    return [
        fingerprint(how, people.space_fingerprint, z, None if residual is None else residual[i])
        for i, z in enumerate(people.z)
    ]


def paint_faces(
    people: Identity, space: Space, studio: Studio, shown: Callable[[list[str | None]], None]
) -> tuple[list[Tensor], list[str]]:
    """Pictures [H, W, 3] of bytes of everybody and their names; `shown` hears of those that are there already.

    What was painted is kept, so after Cancel the next run goes on where this one was.
    """
    check_fit(studio.model, space.layout)
    keys = face_keys(people, studio)
    faces = [gallery.get_face(key) for key in keys]
    missing = [i for i, face in enumerate(faces) if face is None]

    def tell() -> None:
        shown([key if face is not None else None for key, face in zip(keys, faces)])

    tell()
    if missing:
        rows = rows_at_once(studio.model, studio.side, AT_ONCE)
        groups = [missing[start : start + rows] for start in range(0, len(missing), rows)]
        bar = comfy.utils.ProgressBar(len(groups) * studio.steps)
        for some in groups:
            with tensors.ordinary_tensors():
                vectors = torch.cat([people[i].vectors(space) for i in some])
            painted = _paint(studio, space.layout, vectors, lambda: bar.update(1))
            for i, face in zip(some, painted):
                faces[i] = face
                gallery.put_face(keys[i], face)
            tell()
    return [face for face in faces if face is not None], keys


@contextlib.contextmanager
def hooked(model: Any, layout: Layout, vectors: Tensor) -> Iterator[None]:
    """Within the block the UNet of a loaded model adds a LoRA to each row: row i that of vectors [B, P] number i % B.

    The host's sampler gives the UNet whole batches, one after the other for each prompt.
    """
    sites, orders = sites_of(model.model.diffusion_model, check_fit(model, layout))
    lora = layout.unpack(vectors.to(model.load_device))
    reorder(lora, orders)
    with lora_hooks(sites, lora.__getitem__, layout.scale, tiled=True):
        yield


def _paint(studio: Studio, layout: Layout, vectors: Tensor, progress: Callable[[], None]) -> Tensor:
    """Pictures [B, H, W, 3] of bytes, all from the same noise, so that they differ in who it is alone."""
    model, count = studio.model, len(vectors)
    empty = torch.zeros(1, *latent_shape(model, studio.side))
    noise = comfy.sample.prepare_noise(empty, studio.seed).expand(count, -1, -1, -1).contiguous()

    def each(*_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress()

    comfy.model_management.throw_exception_if_processing_interrupted()
    negative = studio.positive if studio.negative is None else studio.negative
    with hooked(model, layout, vectors):
        latents = comfy.sample.sample(
            model, noise, studio.steps, studio.guidance, SAMPLER, SCHEDULER, studio.positive, negative,
            empty.expand(count, -1, -1, -1).contiguous(), callback=each, disable_pbar=True, seed=studio.seed,
        )  # fmt: skip
    return decoded(studio.vae, latents)
