"""Score spaces in the miniature world: what a space keeps of a person, what it dreams up, and how it moves between.

All spaces are photographed in one studio (the same prompts and noise), so that their rows can be compared pairwise.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import identity as identities
from ...errors import LayoutMismatch
from ...metrics import (
    consistency,
    estimate,
    explained_variance,
    id_scores,
    path_roughness,
    pose_diversity,
)
from ...plots import plot_errors, plot_latents
from ...space import Space
from ...spacefile import load_space
from ...training.compute import Compute
from ...training.dataset import VectorDataset, load_dataset
from ..build.loras import LoraSet
from ..records import cell
from ..world.painter import GUIDANCE
from ..world.renderer import sample_nuisance
from ..world.studio import Shots, Studio, open_studio
from .population import crowd_row, readings, reference_row, unit
from .sheets import Strip, save_sheet

SHEET = 12  # faces of a space on a sheet
Row = dict[str, Any]  # {metric: {"mean", "low", "high", "count"}} and plain numbers


@dataclass(frozen=True)
class Protocol:
    """How much is photographed."""

    base: Path
    embedder: Path
    dataset: Path
    people: int = 100  # held-out people, 0 for all
    pictures: int = 4  # of each
    sampled: int = 100  # identities drawn from each space
    paths: int = 12  # interpolated pairs of sampled identities
    path_steps: int = 9
    truncation: float = 1.0
    guidance: float = GUIDANCE
    seed: int = 77
    compute: Compute = field(default_factory=Compute)

    def studio(self) -> Studio:
        """The studio in which everyone is photographed."""
        return open_studio(
            self.base,
            self.embedder,
            device=self.compute.device,
            pictures=self.pictures,
            seed=self.seed,
            guidance=self.guidance,
        )

    def heldout(self, dataset: VectorDataset) -> Tensor:
        """Row numbers of the held-out people that are scored."""
        rows = dataset.heldout_rows
        return rows[: self.people] if self.people else rows


def evaluate_spaces(
    spaces: list[Path],
    protocol: Protocol,
    *,
    workers: int = 1,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Row]:
    """A row for each space, after the rows that need no space: own LoRA, another's, the mean LoRA."""
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        run = protocol.compute.run
        rows, real = pool.submit(run, reference_rows, protocol).result()
        callback("reference rows done")
        jobs = {
            _row_name(path): pool.submit(run, judge_space, path, protocol, real) for path in spaces
        }
        for name, job in jobs.items():
            rows[name] = job.result()
            callback(f"{name} done")
    return rows


def reference_rows(protocol: Protocol) -> tuple[dict[str, Row], Shots]:
    """What real LoRAs of held-out people reach and what nobody's does; and what is seen of the former."""
    dataset, studio = load_dataset(protocol.dataset), protocol.studio()
    held, identity = _heldout(dataset, protocol)
    own = studio.photograph(held, dataset.layout)
    mean = _training_mean(dataset)
    middle = studio.photograph(mean.expand(len(held), -1), dataset.layout)
    rows = {
        "own LoRA": {
            **_faces_row(own, identity),
            **reference_row(own, _known_faces(dataset), unit(identity), dataset.label_names),
            "weight_r2": _json(torch.ones(len(held))),
        },
        "another's LoRA": _id_row(own, identity.roll(1, 0)),
        "mean LoRA": {**_faces_row(middle, identity), "weight_r2": _json(torch.zeros(len(held)))},
    }
    return rows, own


def judge_space(path: Path, protocol: Protocol, real: Shots) -> Row:
    """Everything that is measured of one space; ``real`` is what is seen of real LoRAs."""
    space, dataset, studio = load_space(path), load_dataset(protocol.dataset), protocol.studio()
    if space.layout != dataset.layout:
        raise LayoutMismatch(
            f"{path.name} is a space of layout '{space.layout.name}' with {space.layout.size} parameters, and "
            f"{protocol.dataset.name} holds LoRAs of '{dataset.layout.name}' with {dataset.layout.size}. "
            "Evaluate a space on LoRAs of the layout that it was trained on."
        )
    held, identity = _heldout(dataset, protocol)
    mean = _training_mean(dataset)
    with torch.no_grad():
        reconstruction = space.decode(space.encode(held).mean)
        drawn = space.sample(
            protocol.sampled,
            generator=torch.Generator().manual_seed(protocol.seed),
            truncation=protocol.truncation,
        )
        imagined = studio.photograph(drawn.vectors(space), space.layout)
        rebuilt = studio.photograph(reconstruction, space.layout)
    return {
        "latent": space.latent_size,
        "weight_r2": _json(explained_variance(held, reconstruction, mean)),
        **_faces_row(rebuilt, identity),
        **crowd_row(imagined, real, _known_faces(dataset), unit(identity), dataset.label_names),
        **_paths_row(space, drawn, studio, protocol),
    }


def _heldout(dataset: VectorDataset, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Vectors [N, P] and true identities [N, 20] of the held-out people."""
    rows = protocol.heldout(dataset)
    assert dataset.labels is not None
    return dataset.vectors(rows), dataset.labels[rows]


def _training_mean(dataset: VectorDataset) -> Tensor:
    """The mean LoRA [P] of the training people."""
    return dataset.vectors(dataset.training_rows).mean(0)


def _known_faces(dataset: VectorDataset) -> Tensor:
    """True identities of the training people, as unit vectors [N, 20], drawn again from their seed."""
    world = dataset.provenance["world"]
    people = LoraSet(people=world["people"], heldout=world["heldout"], seed=world["seed"])
    return unit(people.identities()[~people.heldout_flags()])


def _faces_row(shots: Shots, identity: Tensor) -> Row:
    """Whose faces these are, and whether the prompt still steers."""
    photographs = sample_nuisance(2_000, generator=torch.Generator().manual_seed(0)).pose
    return {
        **_id_row(shots, identity),
        "prompt_adherence": _json(shots.prompt_adherence()),
        "pose_diversity": _json(pose_diversity(shots.pose, photographs)),
    }


def _id_row(shots: Shots, identity: Tensor) -> Row:
    """ID scores, by every reader."""
    return {
        f"id_score{suffix}": _json(id_scores(some.embeddings, identity))
        for suffix, some in readings(shots).items()
    }


def _paths_row(space: Space, drawn: identities.Identity, studio: Studio, protocol: Protocol) -> Row:
    """Interpolation between sampled identities: even steps, and whole faces half-way."""
    paths = [
        identities.interpolate(drawn[2 * i], drawn[2 * i + 1], steps=protocol.path_steps).vectors(
            space
        )
        for i in range(min(protocol.paths, len(drawn) // 2))
    ]
    with torch.no_grad():
        shots = studio.photograph(torch.cat(paths), space.layout, same=True)
    likeness = consistency(shots.embeddings).unflatten(0, (len(paths), -1))  # [paths, steps]
    faces = shots.traits.mean(1).unflatten(0, (len(paths), -1))
    ends = (likeness[:, 0] + likeness[:, -1]) / 2
    return {
        "path_roughness": _json(path_roughness(faces)),
        "midpoint_quality": _json(likeness[:, protocol.path_steps // 2] - ends),
    }


def _json(values: Tensor) -> Row:
    return estimate(values).to_json()


def _row_name(path: Path) -> str:
    return path.stem


COLUMNS = {
    "latent": "d", "weight_r2": "weight R2", "id_score": "ID score", "id_score_independent": "ID, independent",
    "prompt_adherence": "prompt adherence",
    "pose_diversity": "pose", "consistency": "consistency", "diversity": "diversity", "energy": "energy",
    "coverage": "coverage", "density": "density",
    "nearest_training": "nearest", "path_roughness": "roughness", "midpoint_quality": "midpoint",
}  # fmt: skip
OLDER_KEYS = {"prompt_adherence": "token_obedience"}  # in results of earlier releases


def table(rows: dict[str, Row]) -> str:
    """The rows as a Markdown table; +- is half of a 95 % confidence interval over identities."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        values = (row.get(key, row.get(OLDER_KEYS.get(key, ""))) for key in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(map(cell, values)) + " |")
    return "\n".join(lines)


def draw(spaces: list[Path], protocol: Protocol, folder: Path) -> list[Path]:
    """Plots of latents and errors over held-out LoRAs, and sheets of sampled and interpolated faces."""
    dataset, studio = load_dataset(protocol.dataset), protocol.studio()
    held, _ = _heldout(dataset, protocol)
    mean = _training_mean(dataset)
    latents: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    samples: list[Strip] = []
    walks: list[Strip] = []
    for path in spaces:
        space, name = load_space(path), _row_name(path)
        with torch.no_grad():
            latents[name] = space.encode(held).mean
            errors[name] = 1 - explained_variance(held, space.decode(latents[name]), mean)
            drawn = space.sample(SHEET, generator=torch.Generator().manual_seed(protocol.seed))
            walk = identities.interpolate(drawn[0], drawn[1], steps=SHEET)
            words, noise = (part[:1].repeat_interleave(SHEET, 0) for part in studio.scenes(1))
            for strips, people in ((samples, drawn), (walks, walk)):
                faces = studio.paint(words, noise, people.vectors(space), space.layout)
                strips.append(Strip(name, faces, SHEET))
    written = [folder / f"{name}.png" for name in ("latents", "errors", "samples", "walks")]
    plot_latents(latents, written[0])
    plot_errors(errors, written[1])
    save_sheet(samples, written[2], scale=2)
    save_sheet(walks, written[3], scale=2)
    return written
