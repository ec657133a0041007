"""Start networks of the miniature world that learn as anybody's must: from paintings of a space's own people.

No label and no rendered picture goes into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files.container import open_container, write_container
from ...placement import Frame
from ...space import Space
from ...spacefile import load_space
from ...start_network import StartNetwork
from ...training.compute import Compute
from ...training.fit_locator import LocatorTraining
from ...training.fit_paintings import PaintingsTraining, fit_paintings, fit_placing
from ...training.fit_start import to_bank
from ...training.painted import PaintedPeople
from ..world.renderer import IMAGE_SIZE
from ..world.studio import Studio

FORMAT = "w2wpp.avatar_paintings"
GROUP = 64  # people whose paintings are a job of a worker


@dataclass(frozen=True)
class Teaching:
    """How much is painted, and what is learned from it."""

    people: int = 1_792
    scenes: int = 2  # of each person, every one with words and noise of its own
    seed: int = 12
    training: PaintingsTraining = field(
        default_factory=lambda: PaintingsTraining(
            size=IMAGE_SIZE, locator=LocatorTraining(size=IMAGE_SIZE)
        )
    )


def teach(
    path: Path,
    studio: Studio,
    folder: Path,
    config: Teaching,
    *,
    keep_answers: bool = False,
    workers: int = 1,
    compute: Compute | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> tuple[StartNetwork, Frame, dict[str, Any]]:
    """What `fit_paintings` makes of people drawn from a space file. ``folder`` keeps their paintings.

    With ``keep_answers`` the space's start network answers as before, and learns where people are: `fit_placing`.
    Raises ConfigError where there is none.
    """
    start = load_space(path).start
    if keep_answers and start is None:
        raise ConfigError(f"{path} has no start network whose answers could be kept.")
    painted = paint_people(path, studio, folder, config, workers=workers, callback=callback)

    def told(done: int, of: int, line: str) -> None:
        if done % 100 == 0 or done == of:
            callback(f"teach: {line} of {of}")

    if keep_answers and start is not None:
        return fit_placing(start, painted, config.training, compute=compute, callback=told)
    return fit_paintings(painted, config.training, compute=compute, callback=told)


def paint_people(
    path: Path,
    studio: Studio,
    folder: Path,
    config: Teaching,
    *,
    workers: int = 1,
    callback: Callable[[str], None] = lambda line: None,
) -> PaintedPeople:
    """People drawn from a space file, each painted in some scenes; those of an interrupted run are kept.

    Workers are processes, where the studio's models are on the CPU.
    """
    space = load_space(path)
    z = space.sample(config.people, generator=torch.Generator().manual_seed(config.seed)).z
    made_by = {
        "space": space.fingerprint,
        "seed": config.seed,
        "scenes": config.scenes,
        "guidance": studio.guidance,
        "steps": studio.steps,
    }
    parts = z.split(GROUP)
    files = [folder / f"{i:04d}.safetensors" for i in range(len(parts))]
    jobs = [
        (file, path, part, studio, i, config.scenes, made_by)
        for i, (file, part) in enumerate(zip(files, parts))
    ]
    alone = studio.base.alphas_cumprod.device.type != "cpu"
    for done in _painted(jobs, 0 if alone else workers):
        callback(f"teach: {done} of {len(jobs)} groups are painted")
    return PaintedPeople(z, torch.cat([open_container(f, FORMAT).read("bank") for f in files]))


def _painted(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """The number of jobs that are done, whenever one is; by single-threaded processes or, without any, by this one."""
    if not workers:
        for done, job in enumerate(jobs, 1):
            _paint(*job)
            yield done
        return
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        submitted = [pool.submit(_paint, *job) for job in jobs]
        for done, running in enumerate(submitted, 1):
            running.result()
            yield done


def _paint(
    file: Path,
    path: Path,
    z: Tensor,
    studio: Studio,
    group: int,
    scenes: int,
    made_by: dict[str, Any],
) -> None:
    """Paint some people [n, d] into a bank [n, scenes, 3, S, S], unless a file has them."""
    if file.exists():
        stored = open_container(file, FORMAT)
        if stored.config.get("made_by") != made_by:
            raise ConfigError(
                f"{file} is from another run. Remove its folder, or match the settings."
            )
        if torch.equal(stored.read("z"), z):
            return
    space: Space = load_space(path)
    here = replace(studio, pictures=scenes, seed=studio.seed + 2_000 + group)
    words, noise = here.scenes(len(z))
    with torch.no_grad():
        pictures = here.paint(words, noise, space.decode(z), space.layout)
    bank = to_bank(pictures.clamp(-1, 1)).unflatten(0, (len(z), -1))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_container(file, {"z": z, "bank": bank}, format=FORMAT, config={"made_by": made_by})
