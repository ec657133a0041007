"""The identity embedder looks at what the host painted: one person stays that person."""

from __future__ import annotations

import numpy as np
import torch

from w2wpp.avatars.embedder import load_embedder

from .graphs import AvatarGraph
from .server import REPO, Host

PEOPLE, SEEDS = (101, 102, 103, 104), (0, 1, 2, 3)


def embeddings(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures [H, W, 3] uint8 -> unit vectors [B, D]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return load_embedder(REPO / "models" / "avatar-embedder.safetensors")(batch)


def test_one_person_over_four_seeds_resembles_herself_more_than_others(host: Host) -> None:
    graph = AvatarGraph(smile="smiling")
    saved = []
    for person in PEOPLE:
        applied = graph.apply(graph.sample(person))
        saved += [graph.paint([applied, 0], seed=seed) for seed in SEEDS]
    result = host.run(graph.nodes)
    vectors = embeddings([picture for node in saved for picture in result.pictures(node)])
    person = torch.arange(len(PEOPLE)).repeat_interleave(len(SEEDS))
    similarity = vectors @ vectors.T
    same = (person[:, None] == person) & ~torch.eye(len(person), dtype=torch.bool)
    other = person[:, None] != person
    for p in range(len(PEOPLE)):
        rows = (person == p)[:, None]
        assert similarity[same & rows].mean() > similarity[other & rows].mean() + 0.2
