"""Every way from one picture to a LoRA, on the same held-out people: ID score, editability, and what it cost.

Recipes were chosen on the first held-out people (rows 800 to 831); those scored here come after them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ...inversion import FROM_AVERAGE, FROM_GUESS, Adam, Cma, Objective, Pivotal, Recipe
from ...metrics import estimate, id_scores, pose_diversity
from ...spacefile import load_space
from ...training.compute import Compute
from ...training.dataset import load_dataset
from ...training.people import Momentum, measure_start
from ..build.dreambooth import DreamBooth, people_loss
from ..build.loras import LoraSet
from ..world.painter import noise_schedule
from ..world.renderer import sample_nuisance
from ..world.studio import Studio, open_studio
from .inversion import AvatarDenoiser, invert_pictures, portraits, weight_space

TUNING = 40  # held-out people that recipes may be chosen on; none of them is scored
GROUP = 50  # people that are inverted side by side
PAPER = {"draws": 1, "fresh": True, "stratified": False, "weighting": "eps"}


@dataclass(frozen=True)
class Row:
    """One way from a picture to a LoRA: a row of the table."""

    label: str
    method: str  # the curve of the plot that it belongs to
    recipe: Recipe | None = None
    space: str = ""  # name of a space file; none for rows without a space


def rows() -> dict[str, Row]:
    """In the order of their importance, so that an interrupted run holds what matters."""
    paper = Recipe(Adam(lr=0.1, betas=(0.9, 0.999), anneal=False), 400, PAPER, None, "mean", "last")
    best = FROM_GUESS["adam"]
    found = {
        "own_lora": Row("own LoRA, 32 pictures", "reference"),
        "w2wpp": Row("VAE, amortised start, Adam (default)", "VAE", best, "avatars"),
        "start": Row("VAE, amortised start alone", "VAE", replace(best, steps=0), "avatars"),
        "pca_adam": Row("PCA 128, Adam as in w2w", "PCA", paper, "avatars-pca"),
        "original_adam": Row("original VAE, Adam", "original VAE", paper, "original"),
        "original_cma": Row(
            "original VAE, CMA-ES 10 x 50, fresh noise",
            "original VAE",
            Recipe(Cma(population=10, mode="full", sigma=0.5), 50, PAPER, None, "mean", "last"),
            "original",
        ),
        "weights_free": Row(
            "weights, no space, Adam",
            "weights",
            Recipe(Adam(lr=0.1), 50, {"draws": 8}, None, "mean", "last"),
        ),
        "single_dreambooth": Row("DreamBooth on the one picture", "weights"),
        "cma": Row("VAE, amortised start, CMA-ES", "VAE, CMA-ES", FROM_GUESS["cma"], "avatars"),
        "multistart": Row(
            "VAE, screened starts, Adam", "VAE, multistart", FROM_GUESS["multistart"], "avatars"
        ),
        "pivotal": Row(
            "VAE, amortised start, Adam, pivotal",
            "VAE, pivotal",
            replace(best, pivotal=Pivotal(steps=4, lr=0.02)),
            "avatars",
        ),
        "mean_adam": Row(
            "VAE, from the mean, Adam", "VAE from the mean", FROM_AVERAGE["adam"], "avatars"
        ),
    }
    for size in (16, 64, 256):
        found[f"pca_{size}"] = Row(f"PCA {size}, Adam as in w2w", "PCA", paper, f"pca-{size}")
    found["pca_start"] = Row("PCA 128, amortised start, Adam", "PCA", best, "avatars-pca")
    return found


@dataclass(frozen=True)
class Material:
    """Files that workers open for themselves."""

    base: Path
    embedder: Path
    dataset: Path
    spaces: dict[str, Path]
    people: int = 50
    compute: Compute = field(default_factory=Compute)

    def scored(self) -> Tensor:
        """Row numbers of the held-out people that are scored, after those kept for tuning.

        Raises DataError where there are too few.
        """
        held = load_dataset(self.dataset).heldout_rows
        if len(held) < TUNING + self.people:
            raise DataError(
                f"{self.dataset} holds {len(held)} held-out people; {TUNING} are kept for tuning and "
                f"{self.people} are asked for."
            )
        return held[TUNING : TUNING + self.people]


Scores = dict[str, Any]


def run_benchmark(
    material: Material,
    *,
    only: Collection[str] = (),
    workers: int = 2,
    callback: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Score all rows, or only some beside the two that all are compared with.

    `save` gets the result so far after each.
    """
    wanted = {n: r for n, r in rows().items() if not r.space or r.space in material.spaces}
    if unknown := set(only) - set(wanted):
        raise ConfigError(f"No row {sorted(unknown)[0]!r} here; there are {', '.join(wanted)}.")
    if only:
        wanted = {n: r for n, r in wanted.items() if n in {"own_lora", "w2wpp", *only}}
    groups = list(material.scored().split(GROUP))
    parts: dict[str, dict[int, Scores]] = {name: {} for name in wanted}
    started, result = time.monotonic(), {}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = {
            pool.submit(material.compute.run, score, row, name, material, group): (name, i)
            for name, row in wanted.items()
            for i, group in enumerate(groups)
        }
        for job in as_completed(jobs):
            name, i = jobs[job]
            parts[name][i] = job.result()
            if len(parts[name]) == len(groups):
                if len(parts["own_lora"]) < len(groups):
                    continue
                done = {n: p for n, p in parts.items() if len(p) == len(groups)}
                result = summary({n: wanted[n] for n in done}, done)
                result["seconds"] = round(time.monotonic() - started)
                save(result)
                callback(f"{name}: {result['rows'][name]['id_score']['mean']:.3f}")
    return result


def score(row: Row, name: str, material: Material, people: Tensor) -> Scores:
    """One row on some people [N]: values by person, and the cost of each."""
    dataset = load_dataset(material.dataset)
    studio = open_studio(
        material.base, material.embedder, device=material.compute.device, seed=int(people[0])
    )
    assert dataset.labels is not None
    identity = dataset.labels[people]
    started = time.process_time()
    residual, evaluations = 0.0, 0
    if name == "own_lora":
        vectors = dataset.vectors(people)
    elif name == "single_dreambooth":
        vectors, evaluations = one_picture_dreambooth(studio, dataset, material, people)
    else:
        assert row.recipe is not None
        space = (
            load_space(material.spaces[row.space])
            if row.space
            else _no_space(material, dataset.layout)
        )
        pictures = portraits(identity, people)
        solution = invert_pictures(studio.base, space, pictures, row.recipe)
        residual, evaluations = solution.residual_norm, solution.evaluations
        with torch.no_grad():
            vectors = solution.identity.vectors(space)
    seconds = (time.process_time() - started) / len(people)
    shots = studio.photograph(vectors, dataset.layout)
    reference = sample_nuisance(2_000, generator=torch.Generator().manual_seed(0)).pose
    scores = {
        "id_score": id_scores(shots.embeddings, identity),
        "prompt_adherence": shots.prompt_adherence(),
        "pose": pose_diversity(shots.pose, reference),
        "evaluations": evaluations,
        "seconds": seconds,
        "residual_norm": residual,
    }
    if name == "own_lora":  # what all are compared with
        nobody = studio.photograph_nobody(len(people))
        scores["prompt_adherence_nobody"] = nobody.prompt_adherence()
        scores["pose_nobody"] = pose_diversity(nobody.pose, reference)
    return scores


def editability(scores: Scores, own: Scores) -> Tensor:
    """[N] in 0..1: mean of prompt adherence and of pose diversity, each relative to pictures of the same scenes that
    the base paints without any LoRA, and at most 1."""
    obeyed = scores["prompt_adherence"] / own["prompt_adherence_nobody"].mean()
    posed = scores["pose"] / own["pose_nobody"].mean()
    return (obeyed.clamp(max=1) + posed.clamp(max=1)) / 2


def summary(named: dict[str, Row], parts: dict[str, dict[int, Scores]]) -> dict[str, Any]:
    """The result by row, with 95 % intervals over people, from the scores of groups of people."""
    joined = {n: _join([p[i] for i in sorted(p)]) for n, p in parts.items()}
    own = joined["own_lora"]
    table: dict[str, Any] = {}
    top: dict[str, Any] = {}
    for name, scores in joined.items():
        edit = editability(scores, own)
        table[name] = {
            "label": named[name].label,
            "method": named[name].method,
            "id_score": estimate(scores["id_score"]).to_json(),
            "editability": estimate(edit).to_json(),
            "prompt_adherence": estimate(scores["prompt_adherence"]).to_json(),
            "pose_diversity": estimate(scores["pose"]).to_json(),
            "id_times_edit": estimate(scores["id_score"] * edit).to_json(),
            "evaluations": scores["evaluations"],
            "seconds": round(scores["seconds"], 3),
            "residual_norm": round(scores["residual_norm"], 3),
        }
        gap = scores["id_score"] - own["id_score"]
        table[name]["above_own_lora"] = estimate(gap).to_json()
        if "w2wpp" in joined:
            gap = joined["w2wpp"]["id_score"] - scores["id_score"]
            table[name]["below_default"] = estimate(gap).to_json()
        top[name] = table[name]["id_score"]["mean"]
        top[f"{name}_edit"] = table[name]["editability"]["mean"]
    if "w2wpp" in table:
        top["evaluations"] = table["w2wpp"]["evaluations"]
    people = len(next(iter(joined.values()))["id_score"]) if joined else 0
    return {**top, "people": people, "tuning_people": TUNING, "rows": table}


# What results of earlier releases call the same rows.
OLDER_ROWS = {
    "hybrid": "multistart",
    "seed_adam": "original_adam",
    "seed_cma": "original_cma",
}


def merged(before: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """A result with the rows of an earlier one that it did not score again."""
    rows_before = {OLDER_ROWS.get(n, n): row for n, row in before.get("rows", {}).items()}
    both = {**rows_before, **result["rows"]}
    return {**before, **result, "rows": {name: both[name] for name in rows() if name in both}}


def table(result: dict[str, Any]) -> str:
    """As Markdown; +- is half of a 95 % interval over people."""

    def cell(value: dict[str, float]) -> str:
        return f"{value['mean']:.3f} +- {(value['high'] - value['low']) / 2:.3f}"

    lines = [
        "| | ID score | of own LoRA | editability | ID x edit | NFE | seconds |",
        "|---" * 7 + "|",
    ]
    own = result["rows"].get("own_lora", {}).get("id_score", {}).get("mean", math.nan)
    for row in result["rows"].values():
        share = row["id_score"]["mean"] / own
        lines.append(
            f"| {row['label']} | {cell(row['id_score'])} | {share:.2f} | {cell(row['editability'])} "
            f"| {row['id_times_edit']['mean']:.3f} | {row['evaluations']} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def one_picture_dreambooth(
    studio: Studio, dataset: Any, material: Material, people: Tensor
) -> tuple[Tensor, int]:
    """The training of the world's own LoRAs, with one picture in place of 32: vectors [N, P] and evaluations."""
    config, layout = DreamBooth(), dataset.layout
    mean = _statistics(material)[0]
    pilots = LoraSet().pilots()[:8]
    loss = people_loss(studio.base, layout, pilots, config)
    start = measure_start(loss, mean, len(pilots), batches=4)
    pictures = portraits(dataset.labels[people], people)
    space = weight_space(layout, mean, torch.ones_like(mean))
    objective = Objective(
        space,
        pictures[:, None],
        AvatarDenoiser(studio.base, layout),
        noise_schedule(studio.base),
        draws=config.pictures,
        fresh=True,
    )
    descent = Momentum(torch.zeros(len(people), layout.size), start, config)
    for step in range(config.steps):
        draw = objective.draw(step)
        descent.step(objective.value_and_gradient(descent.weights, None, draw)[1])
    return space.decode(descent.mean()), objective.evaluations


def _statistics(material: Material) -> tuple[Tensor, Tensor]:
    """Mean and std [P] of the training people's weights, as a basis of theirs keeps them."""
    basis = load_space(material.spaces["avatars-pca"]).basis
    return basis.mean, basis.std.abs()  # type: ignore[union-attr]


def _no_space(material: Material, layout: Any) -> Any:
    return weight_space(layout, *_statistics(material))


def _join(parts: list[Scores]) -> Scores:
    def one(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else sum(values) / len(values)

    return {key: one([p[key] for p in parts]) for key in parts[0]}


def curves(result: dict[str, Any]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(method, [(evaluations, ID score)]) for the plot."""
    methods = dict.fromkeys(row["method"] for row in result["rows"].values())
    for method in methods:
        of = [r for r in result["rows"].values() if r["method"] == method]
        yield method, sorted((r["evaluations"], r["id_score"]["mean"]) for r in of)
