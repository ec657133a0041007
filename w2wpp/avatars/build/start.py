"""The start networks of the miniature world: trained on rendered people, none of whom has a LoRA or is held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files.container import open_container, write_container
from ...space import Space
from ...spacefile import load_space, save_start
from ...start_network import StartNetwork, build_start
from ...training.compute import Compute
from ...training.dataset import VectorDataset
from ...training.directions import encode_rows
from ...training.fit_start import (
    LabelMap,
    Pictures,
    StartTraining,
    picture_bank,
    shrinkage,
    start_from_reader,
    to_bank,
    train_reader,
)
from ..world.renderer import TRAITS, render, sample_identities, sample_nuisance
from ..world.studio import Studio

FORMAT = "w2wpp.avatar_reader"
PICTURES = 120_000  # rendered, for the reader
PAINTINGS = 2_000  # latents that are painted, twice each, to calibrate the answers
TRAINING = StartTraining(steps=4_500)


def reader(
    folder: Path, callback: Callable[[str], None], compute: Compute | None = None
) -> StartNetwork:
    """The network that reads traits from pictures; made once, kept in ``folder``."""
    path, config = folder / "reader.safetensors", TRAINING
    made_by = {"training": asdict(config), "pictures": PICTURES}
    if not path.exists():
        network = train_reader(
            _rendered(config.seed), len(TRAITS), config, compute=compute, callback=callback
        )
        about = {"network": network.config, **made_by}
        write_container(path, dict(network.state_dict()), format=FORMAT, config=about)
    file = open_container(path, FORMAT)
    if {key: file.config.get(key) for key in made_by} != made_by:
        raise ConfigError(
            f"{path} is from a run with other settings. Remove it, or match the settings."
        )
    network = build_start(file.config["network"])
    network.load_state_dict({name: file.read(name) for name in network.state_dict()})
    return network.requires_grad_(False).eval()


def add_start(path: Path, network: StartNetwork, dataset: VectorDataset, studio: Studio) -> Path:
    """Fit a start network to the latents of the training people, calibrate it on paintings, write it into the space."""
    space, rows = load_space(path), dataset.training_rows
    assert dataset.labels is not None
    z = encode_rows(space, dataset)[rows]
    answer = LabelMap.fit(dataset.labels[rows], z, penalty=TRAINING.penalty)
    painted = paintings(answer, PAINTINGS)
    with torch.no_grad():
        read = _read(space, painted, network, studio)
    answer = answer.calibrated(painted, read).stretched(_shrinkage(network))
    start = start_from_reader(network, answer)
    save_start(path, path, start)
    return path


def paintings(answer: LabelMap, count: int, *, seed: int = 12) -> Tensor:
    """Latents [count, d] to paint: most about where answers lie and beyond, a quarter anywhere in the space."""
    generator = torch.Generator().manual_seed(seed)
    people = sample_identities(count, generator=generator)
    reach = 0.5 + 1.5 * torch.rand(count, 1, generator=generator)
    answers = reach * (people @ answer.weights) + answer.bias
    anywhere = torch.randn(answers.shape, generator=generator)
    z = answers + 0.5 * anywhere * (torch.arange(count)[:, None] < count // 2)
    z[-count // 4 :] = anywhere[-count // 4 :]
    return z


def _read(space: Space, z: Tensor, network: StartNetwork, studio: Studio) -> Tensor:
    """Traits [n, 20] that the network reads in pictures of latents, on average over each one's pictures."""
    vectors = (space.decode(part) for part in z.split(64))
    read = []
    for i, part in enumerate(vectors):
        here = replace(studio, pictures=2, seed=studio.seed + 1_000 + i)
        words, noise = here.scenes(len(part))
        pictures = here.paint(words, noise, part, space.layout)
        read.append(network(pictures).unflatten(0, (len(part), -1)).mean(1))
    return torch.cat(read)


def _shrinkage(network: StartNetwork, *, people: int = 4_000, seed: int = 13) -> float:
    """Of what the network reads in rendered pictures of people who are new to it."""
    generator = torch.Generator().manual_seed(seed)
    who = sample_identities(people, generator=generator)
    pictures = render(who, sample_nuisance(people, generator=generator))
    with torch.no_grad():
        return shrinkage(who, torch.cat([network(part) for part in pictures.split(256)]))


def _rendered(seed: int) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    people = sample_identities(PICTURES, generator=generator)
    shots = sample_nuisance(PICTURES, generator=generator)
    return picture_bank(to_bank(render(people, shots)), people)
