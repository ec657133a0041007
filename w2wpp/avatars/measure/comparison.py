"""Candidate spaces side by side on held-out people: what stands behind `benchmarks/results/spaces.json`.

Every candidate rebuilds the same people, who are painted in the same scenes, so that differences are paired. What is
scored is kept in a folder, a file for each space, and an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files.text import read_json
from ...files.writing import write_text
from ...lora.layout import Layout
from ...metrics import explained_variance, id_scores
from ...space import Space
from ...spacefile import load_space, save_space
from ...training.dataset import VectorDataset
from ..build.spaces import (
    DEFAULT,
    LINEAR,
    W2W,
    Candidate,
    Model,
    Workshop,
    candidates,
    sketch_of,
    train_spaces,
)
from ..world.studio import Shots, Studio
from .population import readings

Log = Callable[[str], None]
Scores = dict[str, list[float]]  # of each person, by what was measured
CURVE = (100, 200, 400, 800)  # training people


@dataclass(frozen=True)
class Amounts:
    """How much is painted; a picture costs a score of passes of the base."""

    people: int = 96  # held-out people who are rebuilt
    pictures: int = 1  # of each
    crowd: int = 96  # people drawn from a space, and real ones to compare them with
    crowd_pictures: int = 2  # of each
    judged: int = 256  # rows of a sketch of its own on which lost outputs are measured
    seed: int = 77


@dataclass(frozen=True, eq=False)
class Held:
    """The held-out people of a data set, as workers get them."""

    layout: Layout
    vectors: Tensor  # [N, P]
    identity: Tensor  # [N, D] true
    mean: Tensor  # [P] the mean LoRA of the training people
    judges: Tensor | None  # [n, P] Jacobian rows that no space was fitted to

    def first(self, count: int) -> Held:
        """Only so many of them."""
        return replace(self, vectors=self.vectors[:count], identity=self.identity[:count])


def held_out(dataset: VectorDataset, model: Model | None, amounts: Amounts) -> Held:
    """Those who are scored; raises ConfigError where true identities or people are missing."""
    rows = dataset.heldout_rows
    most = max(amounts.people, amounts.crowd)
    if dataset.labels is None or len(rows) < most:
        raise ConfigError(
            f"The comparison takes true identities (labels) and {most} held-out people. Got {len(rows)} "
            f"{'without labels' if dataset.labels is None else ''}; build more LoRAs or ask for fewer people."
        )
    judges = None
    if model is not None:
        judges = sketch_of(dataset, model, amounts.judged, seed=1)
    mean = dataset.vectors(dataset.training_rows).mean(0)
    return Held(
        dataset.layout, dataset.vectors(rows[:most]), dataset.labels[rows[:most]], mean, judges
    )


def rebuilt(studio: Studio, held: Held, path: Path | None) -> Scores:
    """Scores of the people that a space makes of held-out LoRAs; of the LoRAs themselves without one."""
    started = time.process_time()
    vectors = held.vectors
    if path is not None:
        space = load_space(path)
        with torch.no_grad():
            vectors = space.decode(space.encode(held.vectors).mean)
    scores = _faces(studio.photograph(vectors, held.layout), held.identity)
    scores["weight_r2"] = explained_variance(held.vectors, vectors, held.mean).tolist()
    if held.judges is not None:
        lost = ((vectors - held.vectors) @ held.judges.T).square().sum(1)
        all_of_it = ((held.vectors - held.mean) @ held.judges.T).square().sum(1)
        scores["outputs_lost"] = (lost / all_of_it).tolist()
    return {**scores, "seconds": [time.process_time() - started]}


def nobody(studio: Studio, held: Held) -> Scores:
    """Scores of the mean LoRA: what is reached by knowing nothing of anybody."""
    mean = held.mean.expand(len(held.vectors), -1)
    return _faces(studio.photograph(mean, held.layout), held.identity)


def crowd(studio: Studio, held: Held, path: Path | None, seed: int) -> Scores:
    """Traits that the readers see of people drawn from a space; of the held-out people themselves without one."""
    started = time.process_time()
    vectors = held.vectors
    if path is not None:
        space = load_space(path)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            vectors = space.sample(len(held.vectors), generator=generator).vectors(space)
    shots = studio.photograph(vectors, held.layout)
    seen = {f"traits{s}": some.traits.flatten().tolist() for s, some in readings(shots).items()}
    return {**seen, "seconds": [time.process_time() - started]}


def crowd_shots(scores: Scores, pictures: int, traits: int) -> Shots:
    """What `crowd` kept, as shots: traits alone."""

    def one(suffix: str) -> Shots:
        seen = torch.tensor(scores[f"traits{suffix}"]).reshape(-1, pictures, traits)
        nothing = torch.zeros(*seen.shape[:2], 0)
        return Shots(seen, nothing, nothing)

    shots = one("")
    if "traits_independent" in scores:
        object.__setattr__(shots, "independent", one("_independent"))
    return shots


def _faces(shots: Shots, identity: Tensor) -> Scores:
    scores = {}
    for suffix, some in readings(shots).items():
        scores[f"id_score{suffix}"] = id_scores(some.embeddings, identity).tolist()
        # The same pictures as somebody else's: what chance and a common face are worth.
        scores[f"stranger{suffix}"] = id_scores(some.embeddings, identity.roll(1, 0)).tolist()
    return scores


@dataclass(frozen=True, eq=False)
class Compared:
    """All scores of one data set; keys of `rebuilt` and `drawn` are names of candidates."""

    rebuilt: dict[str, Scores]  # "own" and "mean" among them
    drawn: dict[str, Scores]  # "own" among them
    curve: dict[str, dict[int, Scores]]  # family -> training people -> scores, all of one size
    minutes: float  # of one core, fits included


@dataclass(frozen=True)
class Plan:
    """Which spaces are compared on what."""

    rebuilt: Sequence[Candidate]
    drawn: Sequence[Candidate] = ()
    curve: Sequence[Candidate] = ()
    people: Sequence[int] = CURVE


def full_plan() -> Plan:
    """Everything, on the main data set."""
    small = replace(DEFAULT, latent=32)
    drawn = (W2W, LINEAR, replace(DEFAULT, flow=False), DEFAULT)
    few = (replace(W2W, latent=32), replace(LINEAR, latent=32), replace(small, flow=False))
    return Plan(candidates(), (*drawn, replace(W2W, latent=32), small), few)


def harder_plan() -> Plan:
    """What is asked of the data set whose people were photographed each under conditions of their own."""
    families = {(c.codec, c.metric) for c in (W2W, LINEAR, DEFAULT, Candidate("pca", "update"))}
    return Plan(
        [
            c
            for c in candidates()
            if (c.codec, c.metric) in families and not c.outputs and c.latent > 16
        ]
    )


def compare(
    studio: Studio,
    dataset: VectorDataset,
    model: Model | None,
    folder: Path,
    plan: Plan,
    *,
    amounts: Amounts | None = None,
    workers: int = 1,
    callback: Log = lambda line: None,
) -> Compared:
    """Fit what the plan names and is not in ``folder`` yet, paint, and score.

    Spaces that the data set has too few people for are left out.
    """
    amounts, started = amounts or Amounts(), time.process_time()
    spaces = folder / "spaces"
    wanted = list(dict.fromkeys([*plan.rebuilt, *plan.drawn]))
    fitted = train_spaces(dataset, spaces, model=model, only=wanted, callback=callback)
    paths = {c.name: spaces / f"{c.name}.safetensors" for c in wanted}
    paths = {name: path for name, path in paths.items() if path in fitted}
    curve = _fit_curve(dataset, model, folder, plan, callback)
    held = held_out(dataset, model, amounts)
    people, everyone = held.first(amounts.people), held.first(amounts.crowd)
    one = replace(studio, pictures=amounts.pictures, seed=amounts.seed)
    two = replace(studio, pictures=amounts.crowd_pictures, seed=amounts.seed)
    jobs: dict[str, tuple[Any, ...]] = {
        "rebuilt/own": (rebuilt, one, people, None),
        "rebuilt/mean": (nobody, one, people),
        **{f"rebuilt/{c.name}": (rebuilt, one, people, paths[c.name]) for c in plan.rebuilt if c.name in paths},
        **{f"curve/{path.stem}": (rebuilt, one, people, path) for path in curve.values()},
    }  # fmt: skip
    if plan.drawn:
        jobs["drawn/own"] = (crowd, two, everyone, None, amounts.seed)
    for c in plan.drawn:
        if c.name in paths:
            jobs[f"drawn/{c.name}"] = (crowd, two, everyone, paths[c.name], amounts.seed)
    fits = time.process_time() - started
    scores = _scored(jobs, folder / "scores", amounts, workers, callback)

    def under(kind: str) -> dict[str, Scores]:
        return {
            n.removeprefix(f"{kind}/"): s for n, s in scores.items() if n.startswith(f"{kind}/")
        }

    most = len(dataset.training_rows)
    curves: dict[str, dict[int, Scores]] = {}
    for c in plan.curve:
        sizes = {n: scores[f"curve/{p.stem}"] for (name, n), p in curve.items() if name == c.name}
        if f"rebuilt/{c.name}" in scores:
            sizes[most] = scores[f"rebuilt/{c.name}"]
        curves[c.family] = sizes
    painted = sum(s.get("seconds", [0.0])[0] for s in scores.values())
    return Compared(under("rebuilt"), under("drawn"), curves, (fits + painted) / 60)


def _fit_curve(
    dataset: VectorDataset, model: Model | None, folder: Path, plan: Plan, callback: Log
) -> dict[tuple[str, int], Path]:
    """{(candidate's name, training people): file} of every size below the data set's own."""
    found = {}
    most, whole = len(dataset.training_rows), None
    for people in plan.people if plan.curve else ():
        if people >= most:
            continue
        workshop = None
        for c in plan.curve:
            path = folder / "curve" / f"{c.name}-of-{people}.safetensors"
            if not path.exists():
                whole = whole or Workshop(dataset, model, folder=folder / "spaces")
                workshop = workshop or whole.smaller(people)
                if not workshop.can_make(c):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                space: Space = workshop.make(c)
                save_space(space, path)
                callback(f"curve: {path.stem} fitted")
            found[c.name, people] = path
    return found


def _scored(
    jobs: Mapping[str, tuple[Any, ...]], folder: Path, amounts: Amounts, workers: int, callback: Log
) -> dict[str, Scores]:
    """Run what was not run before under these amounts, in processes of one thread each."""
    found: dict[str, Scores] = {}
    waiting: dict[str, Future[Scores]] = {}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for name, (call, *arguments) in jobs.items():
            key = _key(amounts, arguments)
            path = folder / f"{name}.json"
            kept = read_json(path) if path.exists() else {}
            if kept.get("key") == key:
                found[name] = kept["scores"]
            else:
                waiting[name] = pool.submit(_keep, path, key, call, *arguments)
        for name, job in waiting.items():
            found[name] = job.result()
            callback(f"{name} scored, {len(found)} of {len(jobs)}")
    return found


def _keep(path: Path, key: str, call: Callable[..., Scores], *arguments: Any) -> Scores:
    scores = call(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"key": key, "scores": scores}))
    return scores


def _key(amounts: Amounts, arguments: Sequence[Any]) -> str:
    """Names what a score depends on: amounts, the people, and the space's coordinates."""
    digest = hashlib.sha256(repr(asdict(amounts)).encode())
    for argument in arguments:
        if isinstance(argument, Path):
            digest.update(load_space(argument).fingerprint.encode())
        elif isinstance(argument, Held):
            digest.update(argument.vectors.numpy().data)
    return digest.hexdigest()[:32]
