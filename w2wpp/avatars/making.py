"""What the stages of the miniature world do: each reads its inputs, runs, writes its outputs, and says what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..files.writing import write_text
from ..spacefile import load_space, save_directions, save_start
from ..training.compute import Compute
from ..training.dataset import VectorDataset, load_dataset
from ..training.directions import report, space_directions
from .build import spaces, start
from .build import teach as teaching
from .build.catalogue import catalogue
from .build.dreambooth import DreamBooth
from .build.loras import LoraSet, build_loras
from .build.train_base import BaseTraining, launch_base
from .build.train_embedder import EmbedderTraining, measure_embedder, train_embedder
from .edition2.reader import save_reader
from .edition2.train_reader import TRAININGS, measure_reader, train_reader
from .edition2.train_vae import VaeTraining, measure_vae, train_vae
from .edition2.vae import save_vae
from .measure import directions
from .measure.gate import gate_table, judge_world
from .measure.model import model_of
from .places import World
from .records import provenance, save_result
from .stages import BASE, DATASET, EMBEDDER, JUDGE, READER, SHIPPED, VAE
from .world.base import save_base
from .world.embedder import save_embedder
from .world.studio import Studio, open_studio

READABLE = 0.1  # R2 on held-out people below which latents do not tell an attribute
Log = Callable[[str], None]
Made = dict[str, Any]


def make_vae(world: World, log: Log, *, output: Path | None = None) -> Made:
    """Train the autoencoder of the second edition, and measure it on strangers."""
    started, config, output = time.monotonic(), VaeTraining(), output or world.at(VAE)
    trained = train_vae(config, checkpoint=world.work / "vae.ckpt", callback=log)
    figures = measure_vae(trained)
    about = provenance("vae", asdict(config), started)
    save_vae(trained, output, {**about, "figures": figures})
    return {"written": str(output), **figures}


def make_base(world: World, log: Log, *, processes: int, output: Path | None = None) -> Made:
    """Train the diffusion model; resumes from the checkpoint in the working folder."""
    started, config, output = time.monotonic(), BaseTraining(), output or world.at(BASE)
    trained = launch_base(
        config, processes=processes, checkpoint=world.work / "base.ckpt", callback=log
    )
    save_base(trained, output, provenance("base", asdict(config), started))
    return {"written": str(output), "seconds": round(time.monotonic() - started)}


def make_embedder(world: World, log: Log, *, output: Path | None = None) -> Made:
    """Train the embedder, which gives ID scores, and measure it on strangers."""
    started, config, output = time.monotonic(), EmbedderTraining(), output or world.at(EMBEDDER)
    trained = train_embedder(config, checkpoint=world.work / "embedder.ckpt", callback=log)
    figures = measure_embedder(trained)
    about = provenance("embedder", asdict(config), started)
    save_embedder(trained, output, {**about, "figures": figures})
    return {"written": str(output), **figures}


def make_readers(world: World, log: Log, *, output: Path | None = None) -> Made:
    """Train both readers and measure them on strangers: the one that ID scores and starts rest on, and its judge."""
    made: Made = {}
    for make, name in (("conv", READER), ("mixer", JUDGE)):
        started, config = time.monotonic(), TRAININGS[make]
        path = world.at(name) if output is None else output / Path(name).name
        trained = train_reader(config, checkpoint=world.work / f"{make}.ckpt", callback=log)
        figures = measure_reader(trained)
        about = provenance("readers", asdict(config), started)
        save_reader(trained, path, {**about, "figures": figures})
        made[make] = {"written": str(path), **figures}
    return made


def make_loras(
    world: World,
    log: Log,
    *,
    people: int | None,
    conditions: str,
    workers: int,
    compute: Compute | None = None,
) -> Made:
    """Fine-tune a LoRA for every person and gather them as a data set."""
    started = time.monotonic()
    config = LoraSet(training=DreamBooth(conditions=conditions))  # type: ignore[arg-type]
    if people:
        config = replace(config, people=people)
    folder = world.work / f"loras-{conditions}"
    dataset = build_loras(
        world.at(BASE), config, folder, workers=workers, compute=compute, callback=log
    )
    return {
        "written": str(folder / "dataset.safetensors"),
        "people": len(dataset),
        "parameters": dataset.layout.size,
        "seconds": round(time.monotonic() - started),
    }


def make_gate(
    world: World,
    log: Log,
    *,
    data: Path | None = None,
    output: Path | None = None,
    compute: Compute | None = None,
) -> Made:
    """Judge whether there is anything to learn: the figures of results/world.json."""
    dataset, output = _dataset(world, data), output or world.at("results/world.json")
    result = judge_world(_studio(world, compute), dataset, components=spaces.components_of(dataset))
    save_result(output, result, gate_table(result))
    log(gate_table(result))
    return {"written": str(output), **result}


def make_spaces(
    world: World,
    log: Log,
    *,
    data: Path | None = None,
    output: Path | None = None,
    ship: bool = False,
    replace: bool = False,
    compute: Compute | None = None,
) -> Made:
    """Train the spaces that are compared; with `ship` the two that go into models/."""
    dataset, folder = _dataset(world, data), output or world.at("work/spaces")
    model = model_of(_studio(world, compute), dataset.layout)
    written = spaces.train_spaces(dataset, folder, model=model, compute=compute, callback=log)
    if ship:
        written += spaces.ship(dataset, folder, world.models, replace=replace)
    return {"written": [str(path) for path in written]}


def make_start(
    world: World,
    log: Log,
    *,
    space: Sequence[Path] = (),
    data: Path | None = None,
    ship: bool = False,
    compute: Compute | None = None,
) -> Made:
    """Train a start network and add it to space files, in place."""
    dataset, network = _dataset(world, data), start.reader(world.work, log, compute)
    paths = [*space, *(map(world.at, SHIPPED) if ship else ())]
    written = [start.add_start(path, network, dataset, _studio(world, compute)) for path in paths]
    return {"written": [str(path) for path in written]}


def make_teach(
    world: World,
    log: Log,
    *,
    space: Sequence[Path] = (),
    output: Path | None = None,
    people: int | None = None,
    keep_answers: bool = False,
    ship: bool = False,
    workers: int,
    compute: Compute | None = None,
) -> Made:
    """Start networks that learned from paintings of the spaces' own people alone, into copies of space files.

    With `keep_answers` the network that a space has answers as before, and learns where people are.
    With `ship` the result also goes into the default space of models/.
    """
    config, folder = teaching.Teaching(), output or world.at("work/taught")
    config, made = replace(config, people=people or config.people), {}
    for path in space or tuple(map(world.at, SHIPPED)):
        start, frame, report = teaching.teach(
            path,
            _studio(world, compute),
            world.work / "paintings" / load_space(path).fingerprint[:12],
            config,
            keep_answers=keep_answers,
            workers=workers,
            compute=compute,
            callback=log,
        )
        folder.mkdir(parents=True, exist_ok=True)
        shipped = [path] if ship and path == world.at(SHIPPED[0]) else []
        for target in (folder / path.name, *shipped):
            save_start(path, target, start, frame=frame)
        made[path.stem] = {"written": str(folder / path.name), **report}
    return made


def make_directions(
    world: World,
    log: Log,
    *,
    people: int,
    space: Sequence[Path] = (),
    data: Path | None = None,
    output: Path | None = None,
    ship: bool = False,
    compute: Compute | None = None,
) -> Made:
    """Measure edit directions in pictures; with `ship` those that pass go into the space files."""
    started, dataset = time.monotonic(), _dataset(world, data)
    output = output or world.at("results/directions.json")
    studio = replace(_studio(world, compute), pictures=1)
    tables, results = [], {}
    for path in space or [world.at(name) for name in SHIPPED]:
        here = load_space(path)
        found = space_directions(here, dataset)
        names = [n for n, r2 in zip(found.names, found.r2.tolist()) if r2 >= READABLE]
        debiased = space_directions(here, dataset, only=names)
        naive = space_directions(here, dataset, only=names, debias=False)
        crowd = directions.people(here, dataset, people, studio.seed)
        rows = directions.measure_directions(here, debiased, naive, studio, crowd, callback=log)
        results[path.stem] = {"rows": rows, "readings": report(found, True)}
        tables.append(f"## {path.stem}\n\n{directions.table(rows)}\n")
        if ship:
            kept = {n: v for n, v in debiased.as_mapping().items() if rows[n]["passes"]}
            save_directions(path, path, kept, report(debiased, True))
    result = {
        "people": people,
        "strengths": directions.STRENGTHS,
        "spaces": results,
        "seconds": round(time.monotonic() - started),
    }
    save_result(output, result, "\n".join(tables))
    return {"written": str(output)}


def make_list(world: World, log: Log) -> Made:
    """Write models/README.md: origin, size and checksum of every file."""
    path = world.at("models/README.md")
    write_text(path, catalogue(world.models))
    return {"written": str(path)}


def _dataset(world: World, path: Path | None) -> VectorDataset:
    return load_dataset(path or world.at(DATASET))


def _studio(world: World, compute: Compute | None = None) -> Studio:
    device = (compute or Compute()).device
    return open_studio(world.at(BASE), world.at(EMBEDDER), device=device)
