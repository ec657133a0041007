"""The start networks of the miniature world: trained on rendered people, none of whom has a LoRA or is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..container import open_container, write_container
from ..spacefile import load_space, save_space
from ..start import StartNetwork, build_start
from ..training.dataset import VectorDataset
from ..training.fit_start import (
    Pictures,
    StartTraining,
    picture_bank,
    start_from_reader,
    to_bank,
    train_reader,
)
from .renderer import TRAITS, render, sample_identities, sample_nuisance

FORMAT = "w2wpp.avatar_reader"
PICTURES = 40_000
# Answers are shrunk to the mean; ID scores of 16 held-out people of the tuning split rose up to about here.
SCALE = 1.5


def reader(folder: Path, callback: Callable[[str], None]) -> StartNetwork:
    """The network that reads traits from pictures; made once, kept in ``folder``."""
    path, config = folder / "reader.safetensors", StartTraining()
    if not path.exists():
        network = train_reader(_rendered(config.seed), len(TRAITS), config, callback=callback)
        about = {"network": network.config, "training": asdict(config), "pictures": PICTURES}
        write_container(path, dict(network.state_dict()), format=FORMAT, config=about)
    file = open_container(path, FORMAT)
    network = build_start(file.config["network"])
    network.load_state_dict({name: file.read(name) for name in network.state_dict()})
    return network.requires_grad_(False).eval()


def add_start(path: Path, network: StartNetwork, dataset: VectorDataset) -> Path:
    """Write a start network into a space file, fitted to the space's latents of the training people."""
    space, rows = load_space(path), dataset.training_rows
    assert dataset.labels is not None
    with torch.no_grad():
        z = torch.cat([space.encode(w).mean for _, w in dataset.chunks(rows)])
    start = start_from_reader(network, dataset.labels[rows], z, scale=SCALE)
    save_space(replace(space, start=start), path)
    return path


def _rendered(seed: int) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    people = sample_identities(PICTURES, generator=generator)
    shots = sample_nuisance(PICTURES, generator=generator)
    return picture_bank(to_bank(render(people, shots)), people)
