"""The miniature world as the benchmark of wild pictures sees it, over a studio and its embedders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...lora.layout import Layout
from ...spacefile import load_space
from ...training.compute import Compute
from ...training.dataset import load_dataset
from ..places import World
from ..records import hardware, save_result
from ..stages import BASE, EMBEDDER
from ..world.renderer import IMAGE_SIZE, TRAITS, Nuisance, render, sample_nuisance
from ..world.studio import Studio, open_studio
from .inversion import PORTRAIT_SEED
from .wild import run_wild, table

SHOT = 1_000_000  # between the seeds of a person's portraits
GLASSES_ON = 1.6  # of the trait
Embedder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StudioWorld:
    """A studio, and further embedders that read the same paintings, by name."""

    studio: Studio
    more: Mapping[str, Embedder]
    size: int = IMAGE_SIZE

    def portraits(self, identity: Tensor, rows: Tensor, shot: int) -> tuple[Tensor, Tensor]:
        """See `WildWorld`. A mask is what two backgrounds leave the same."""
        shots = [_shot(int(row), shot) for row in rows]
        pictures = torch.cat([render(one[None], how) for one, how in zip(identity, shots)])
        white, grey = (
            torch.cat(
                [
                    render(one[None], replace(how, background=torch.tensor([kind])))
                    for one, how in zip(identity, shots)
                ]
            )
            for kind in (0, 1)
        )
        same = (white - grey).abs().amax(1, keepdim=True)
        # Light from one side leaves less of a difference on the other.
        return pictures, (1 - 1.6 * same / same.amax((1, 2, 3), keepdim=True)).clamp(0, 1)

    def glasses(self, identity: Tensor) -> Tensor:
        """See `WildWorld`."""
        changed = identity.clone()
        changed[:, TRAITS.index("glasses")] = GLASSES_ON
        return changed

    def read(self, vectors: Tensor, layout: Layout) -> dict[str, Tensor]:
        """See `WildWorld`."""
        words, noise = self.studio.scenes(len(vectors))
        pictures = self.studio.paint(words, noise, vectors, layout)
        shots = self.studio.read(pictures, words, len(vectors))
        found = {"project": shots.embeddings}
        with torch.no_grad():
            for name, embed in self.more.items():
                seen = torch.cat([embed(part) for part in pictures.split(256)])
                found[name] = seen.unflatten(0, (len(vectors), -1))
        return found


def _shot(row: int, shot: int) -> Nuisance:
    generator = torch.Generator().manual_seed(PORTRAIT_SEED + row + SHOT * shot)
    return sample_nuisance(1, generator=generator)


def report_wild(
    paths: list[Path],
    world: World,
    *,
    data: Path,
    people: int,
    compute: Compute | None = None,
    output: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`w2wpp evaluate --wild SPACE [LEARNED]`: the result, written with its table after every condition."""
    if not 1 <= len(paths) <= 2:
        raise ConfigError(
            "--wild takes a space with a start network, and optionally the same space with one that learned from "
            f"paintings alone. Got {len(paths)} files."
        )
    space, *others = map(load_space, paths)
    learned = others[0] if others else None
    if learned is not None and learned.fingerprint != space.fingerprint:
        raise ConfigError(f"{paths[1]} is another space than {paths[0]}: their people differ.")
    dataset = load_dataset(data)
    rows = dataset.heldout_rows[: people or None]
    if dataset.labels is None or not len(rows):
        raise ConfigError(f"{data} holds no held-out people with their traits.")
    studio = open_studio(
        world.at(BASE),
        world.at(EMBEDDER),
        device=(compute or Compute()).device,
        seed=int(rows[0]),
    )
    output = output or world.at("results/wild.json")

    def save(result: dict[str, Any]) -> None:
        save_result(output, {**result, "hardware": hardware()}, table(result))

    result = run_wild(
        StudioWorld(studio, {}), space, dataset.labels[rows], rows, dataset.vectors(rows),
        learned=learned, callback=callback, save=save,
    )  # fmt: skip
    callback(table(result))
    return result
