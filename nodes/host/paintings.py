"""Paintings of many people with the user's model, kept as files: what a start network learns from.

They lie in a folder of their own under output/w2wpp/, as ordinary pictures beside an identity file and the table that
`w2wpp fit-start --painted` reads, so that an interrupted run goes on and another machine can learn from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ...w2wpp import Identity, Space, save_identity
from ...w2wpp.errors import ConfigError
from ...w2wpp.files.pictures import save_picture
from ...w2wpp.files.writing import replacing
from .crowd import hooked
from .easel import SAMPLER, SCHEDULER, decoded, latent_shape, rows_at_once, side_of
from .fingerprints import fingerprint, model_fingerprint, vae_fingerprint
from .model import check_fit

AT_ONCE = 4  # rows that are painted together at most
PEOPLE, TABLE = "people.safetensors", "painted.csv"
LARGEST = 512  # side of a painting unless somebody says otherwise


@dataclass(frozen=True)
class Painter:
    """What is painted with, and how; the i-th scene is a prompt of its own."""

    model: Any
    vae: Any
    scenes: list[list]
    negative: list | None
    size: int  # side in pixels; 0 for the model's own, up to LARGEST
    steps: int
    cfg: float
    seed: int

    @property
    def side(self) -> int:
        """Side of the paintings in pixels, a multiple of what the UNet needs."""
        return side_of(self.model, self.size, LARGEST)

    def folder(self, space: Space) -> Path:
        """Where its paintings of a space lie: another model, prompt or size has another folder."""
        how = [self.side, self.steps, self.cfg, self.seed, SAMPLER, SCHEDULER]
        key = fingerprint(
            model_fingerprint(self.model), vae_fingerprint(self.vae), [self.scenes, self.negative], how,
            space.fingerprint,
        )  # fmt: skip
        return Path(folder_paths.get_output_directory(), "w2wpp", f"paintings_{key[:12]}")


def paint_people(
    painter: Painter,
    space: Space,
    people: Identity,
    told: Callable[[int, int, str, Image.Image | None], None],
) -> Path:
    """Paint everybody in every scene; the path of the table of all paintings.

    The second painting of a person in a scene has other noise if there is one scene only. What is there already stays.
    `told` hears of each group (done, of, line, one of its pictures), and may raise to stop.
    """
    check_fit(painter.model, space.layout)
    folder = painter.folder(space)
    folder.mkdir(parents=True, exist_ok=True)
    save_identity(people, folder / PEOPLE)
    scenes = max(2, len(painter.scenes))
    jobs = [(i, s) for i in range(len(people)) for s in range(scenes)]
    missing = [job for job in jobs if not _file(folder, *job).exists()]
    done, started, first = len(jobs) - len(missing), time.monotonic(), len(jobs) - len(missing)
    rows = rows_at_once(painter.model, painter.side, AT_ONCE)
    told(done, len(jobs), f"{done} of {len(jobs)} paintings are there", None)
    for scene in range(scenes):  # one prompt at a time, for the rows of a batch share it
        own = [job for job in missing if job[1] == scene]
        for start in range(0, len(own), rows):
            some = own[start : start + rows]
            for job, picture in zip(some, _paint(painter, space, people, some)):
                save_picture(picture, _file(folder, *job))
            done += len(some)
            left = (time.monotonic() - started) / max(1, done - first) * (len(jobs) - done)
            told(done, len(jobs), f"painting {done} of {len(jobs)}, {_minutes(left)} left", picture)
    lines = [f"{_file(folder, *job).name},{PEOPLE},{job[0]}" for job in jobs]
    with replacing(folder / TABLE) as file:
        file.write("\n".join(["picture,identity,index", *lines, ""]).encode())
    return folder / TABLE


def _file(folder: Path, person: int, scene: int) -> Path:
    return folder / f"{person:05}-{scene}.png"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _paint(
    painter: Painter, space: Space, people: Identity, jobs: list[tuple[int, int]]
) -> list[Image.Image]:
    model, scene = painter.model, painter.scenes[jobs[0][1] % len(painter.scenes)]
    with torch.inference_mode(False), torch.no_grad():
        vectors = torch.cat([people[person].vectors(space) for person, _ in jobs])
    empty = torch.zeros(1, *latent_shape(model, painter.side))
    noise = torch.cat(
        [comfy.sample.prepare_noise(empty, painter.seed + 1 + s + 8 * p) for p, s in jobs]
    )
    negative = scene if painter.negative is None else painter.negative
    guidance = 1.0 if painter.negative is None else painter.cfg

    def each(*_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    each()
    with hooked(model, space.layout, vectors):
        latents = comfy.sample.sample(
            model, noise, painter.steps, guidance, SAMPLER, SCHEDULER, scene, negative,
            torch.zeros_like(noise), callback=each, disable_pbar=True, seed=painter.seed,
        )  # fmt: skip
    return [Image.fromarray(picture.numpy(), "RGB") for picture in decoded(painter.vae, latents)]


def draw_people(space: Space, count: int, seed: int) -> Identity:
    """Who is painted: the first of a longer draw are the same people."""
    if count < 1:
        raise ConfigError(f"At least one person is painted. Got {count}.")
    return space.sample(count, generator=torch.Generator().manual_seed(seed))
